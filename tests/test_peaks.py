"""Peaks: the dip against its definition, as a linear program."""

import numpy as np
import pytest
from scipy.optimize import linprog

from segpc_nb.peaks import dip_statistic, dip_test, fit_mixture


def dip_by_definition(values):
    "The smallest distance to a distribution that is convex below a value and concave above it, over all values."
    x, counts = np.unique(values, return_counts=True)
    after = np.cumsum(counts) / len(values)
    before, n, best = after - counts / len(values), len(x), 1.0

    for mode in range(n):  # where the distribution may jump: its left limit there is variable n, the distance n + 1

        def left(i, mode=mode):
            return n if i == mode else i

        rows, bounds = [], []

        def demand(terms, bound, rows=rows, bounds=bounds):
            coefficients = np.zeros(n + 2)
            for i, value in terms:
                coefficients[i] += value
            rows.append(coefficients)
            bounds.append(bound)

        for i in range(n):
            for variable, value in ((left(i), before[i]), (i, after[i])):
                demand([(variable, 1), (n + 1, -1)], value)
                demand([(variable, -1), (n + 1, -1)], -value)
        demand([(n, 1), (mode, -1)], 0)
        for i in range(1, n):
            demand([(i - 1, 1), (left(i), -1)], 0)
        for i in range(1, n - 1):
            one, two = 1 / (x[i] - x[i - 1]), 1 / (x[i + 1] - x[i])
            if i < mode:
                demand([(i, one + two), (i - 1, -one), (left(i + 1), -two)], 0)
            elif i > mode:
                demand([(i, -one - two), (i - 1, one), (i + 1, two)], 0)
        found = linprog(np.eye(n + 2)[-1], np.array(rows), bounds, bounds=[(0, 1)] * (n + 2))
        best = min(best, found.fun) if found.status == 0 else best
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_dip_is_what_its_definition_says(seed):
    rng = np.random.default_rng(seed)
    for values in (
        rng.normal(size=15),
        np.concatenate([rng.normal(size=9), rng.normal(5, 1, 9)]),
        rng.integers(0, 6, 20).astype(float),
        rng.uniform(size=4),
    ):
        assert dip_statistic(values) == pytest.approx(dip_by_definition(values), abs=1e-7)


def test_the_dip_does_not_depend_on_unit_order_or_direction():
    values = np.random.default_rng(1).gamma(2, size=200)
    for same in (values[::-1], 3 * values + 7, -values):
        assert dip_statistic(same) == pytest.approx(dip_statistic(values), abs=1e-12)


def test_the_test_is_right_under_its_own_null_and_sees_two_peaks():
    rng = np.random.default_rng(2)
    p = [dip_test(rng.uniform(size=60), 60, seed)[1] for seed in range(60)]
    assert 0.35 < np.mean(p) < 0.65 and np.mean(np.array(p) <= 0.1) < 0.25
    apart = np.concatenate([rng.normal(size=60), rng.normal(6, 1, 60)])
    assert dip_test(apart, 100)[1] < 0.02


def test_a_mixture_is_found_again():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(0.1, 0.03, 100), rng.normal(1.3, 0.4, 900)])
    mixture = fit_mixture(values, 2)
    assert mixture.means == pytest.approx([0.1, 1.3], abs=0.05)
    assert mixture.weights == pytest.approx([0.1, 0.9], abs=0.02)
    assert mixture.spreads == pytest.approx([0.03, 0.4], abs=0.03)
    assert mixture.bic < min(fit_mixture(values, k).bic for k in (1, 3))
    assert mixture.peaks(np.linspace(0, 3, 1000)) == pytest.approx([0.1, 1.3], abs=0.05)
