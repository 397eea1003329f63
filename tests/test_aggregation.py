"""Aggregation: one nucleus per cell, one cell per nucleus, and fitted ratios as good as an exhaustive search."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segpc_nb.aggregation import (
    RegionProbability,
    accepts,
    cell_from_probability,
    clean_cell,
    component_of_nucleus,
    fit_upper_ratios,
    fuse,
    keep_all,
    make_candidate,
    non_maximum_suppression,
    oracle,
    select_by_ratio,
    single_scale,
)
from segpc_nb.cells import cell_from_parts, iou_table, window
from segpc_nb.regions import nucleus_box, region_box
from segpc_nb.scales import PAPER_SCALES

SHAPE = (48, 64)


def nucleus_at(id, row, column, radius):
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    disc = np.hypot(rows - row, columns - column) <= radius
    return cell_from_parts(id, (0, 0, *SHAPE), disc, np.zeros_like(disc))


def noisy_candidates(rng, n, scales=PAPER_SCALES, grid=None):
    "Some nuclei anywhere, with blobs of noise as predictions, on the picture's pixels or on a grid of the crop."
    picture = []
    for id in range(1, n + 1):
        nucleus = nucleus_at(id, rng.integers(0, SHAPE[0]), rng.integers(0, SHAPE[1]), rng.integers(1, 7))
        predicted = []
        for scale in scales:
            top, left, bottom, right = region_box(nucleus_box(nucleus), scale)
            box = (
                (top, left, bottom, right)
                if grid
                else (max(top, 0), max(left, 0), min(bottom, SHAPE[0]), min(right, SHAPE[1]))
            )
            noise = ndimage.gaussian_filter(rng.random(grid or (box[2] - box[0], box[3] - box[1])), 1.5)
            probability = np.clip((noise - 0.5) * 6 + 0.5, 0, 1).astype(np.float32)
            predicted.append(make_candidate(RegionProbability(nucleus, box, probability, SHAPE, scale)))
        picture.append(predicted)
    return picture


seeds = st.integers(0, 10_000).map(np.random.default_rng)


@settings(max_examples=60, deadline=None)
@example(np.random.default_rng(50), 1, (24, 24))
@given(seeds, st.integers(1, 5), st.sampled_from([None, (6, 6), (24, 24), (96, 96)]))
def test_every_cell_holds_its_nucleus_and_disjoint_cytoplasm(rng, n, grid):
    for scales in (picture := noisy_candidates(rng, n, grid=grid)):
        for candidate in scales:
            cell = candidate.cell
            assert np.array_equal(window(candidate.nucleus, cell.bbox)[0], cell.nucleus)
            assert cell.nucleus.sum() == candidate.nucleus.area and not (cell.nucleus & cell.cytoplasm).any()
            assert cell.id == candidate.nucleus.id and cell.scale == candidate.scale and 0 <= cell.score <= 1
            assert ndimage.label(cell.mask)[1] == 1  # one component
    for cell in fuse(picture):
        assert cell.nucleus.sum() == picture[cell.id - 1][0].nucleus.area and not (cell.nucleus & cell.cytoplasm).any()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 6), st.lists(st.floats(-1, 5), min_size=3, max_size=3))
def test_never_more_than_one_cell_per_nucleus_but_for_keep_all(rng, n, upper):
    picture = noisy_candidates(rng, n)
    everyone = list(range(1, n + 1))
    for cells in (select_by_ratio(picture, tuple(upper)), fuse(picture), single_scale(picture, 2), oracle(picture, [])):
        assert [cell.id for cell in cells] == everyone
    suppressed = [cell.id for cell in non_maximum_suppression(picture)]
    assert suppressed == sorted(set(suppressed)) and set(suppressed) <= set(everyone)
    kept = [(cell.id, cell.scale) for cell in keep_all(picture)]
    assert len(kept) == len(set(kept)) <= 4 * n


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.floats(-1, 5), min_size=3, max_size=3))
def test_lazy_evaluation_of_scales_selects_the_same_cells(rng, upper):
    picture, evaluated = noisy_candidates(rng, 4), 0
    for scales, eager in zip(picture, select_by_ratio(picture, tuple(upper))):
        for position, candidate in enumerate(scales):
            evaluated += 1
            if accepts(candidate.cell, position, tuple(upper)):
                break
        assert candidate.cell is eager
    assert evaluated <= 16


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0, 4), st.sampled_from([0.3, 0.48, 0.52]))
def test_the_component_kept_holds_most_of_the_nucleus(rng, blur, level):
    mask = ndimage.gaussian_filter(rng.random((30, 40)), blur) > level
    nucleus = ndimage.gaussian_filter(rng.random((30, 40)), 2) > 0.53
    nucleus[rng.integers(30), rng.integers(40)] = True
    components, _ = ndimage.label(mask | nucleus)
    counts = np.bincount(components[nucleus])
    expected = [(components == number) | nucleus for number in np.flatnonzero(counts == counts.max())]
    assert any(np.array_equal(component_of_nucleus(mask, nucleus), component) for component in expected)


def test_the_component_of_the_nucleus_wins_over_a_larger_one():
    nucleus = np.zeros((20, 40), bool)
    nucleus[8:12, 4:8] = True
    mask = np.zeros_like(nucleus)
    mask[6:14, 2:10] = mask[1:19, 15:39] = True
    kept = clean_cell(mask, nucleus)
    assert kept[:, :12].sum() == 64 and not kept[:, 12:].any()


def test_crops_that_gain_nothing_are_not_predicted():
    rng = np.random.default_rng(4)
    picture = noisy_candidates(rng, 6)
    last = [scales[-1].cell for scales in picture]
    assert fit_upper_ratios([picture], [last]) == ((-1.0, -1.0, -1.0), 1.0)
    truth = [scales[rng.integers(0, 4)].cell for scales in picture]
    alone = [iou_table(truth, single_scale(picture, k)).max(1).mean() for k in range(4)]
    assert fit_upper_ratios([picture], [truth], tolerance=1)[1] == pytest.approx(max(alone))  # one crop per nucleus


def test_fitted_ratios_equal_an_exhaustive_search_through_the_rule_itself():
    rng = np.random.default_rng(3)
    pictures = [noisy_candidates(rng, 4, PAPER_SCALES[:3]) for _ in range(3)] + [[]]
    truths = [[scales[rng.integers(0, 3)].cell for scales in picture[:3]] for picture in pictures[:3]] + [
        [nucleus_at(1, 20, 20, 5)]
    ]
    upper, score = fit_upper_ratios(pictures, truths, steps=5, tolerance=0)
    n_cells = sum(map(len, truths))

    def official(upper):
        chosen = [select_by_ratio(picture, upper) if picture else [] for picture in pictures]
        return sum(iou_table(truth, cells).max(1, initial=0).sum() for truth, cells in zip(truths, chosen)) / n_cells

    assert official(upper) == pytest.approx(score)
    columns = np.array([[c.cell.ratio for c in scales] for picture in pictures for scales in picture]).T
    grid = [[-1.0, *np.quantile(column, np.linspace(0, 1, 5))] for column in columns[:2]]
    assert score == pytest.approx(max(official(values) for values in product(*grid)))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_no_rule_beats_the_oracle(rng):
    picture = noisy_candidates(rng, 3)
    truth = [scales[rng.integers(0, 4)].cell for scales in picture]

    def own(cells):
        "How well each nucleus' cell agrees with any annotated one."
        return iou_table(cells, truth).max(1)

    bound = own(oracle(picture, truth))
    for position in range(4):
        assert (own(single_scale(picture, position)) <= bound + 1e-12).all()
    assert (own(select_by_ratio(picture, (0.5, 1.0, 2.0))) <= bound + 1e-12).all()


def test_wrong_numbers_of_ratios_and_nothing_to_fit_on():
    picture = noisy_candidates(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="upper_ratios has 1 values for 4 scales"):
        select_by_ratio(picture, (1.0,))
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        fit_upper_ratios([[], picture], [[nucleus_at(1, 9, 9, 3)], []])


@pytest.mark.parametrize("size", [24, 96])  # coarser than the picture, and finer
def test_an_unsure_network_lowers_the_score_and_keeps_the_outline(size):
    rows, columns = np.mgrid[:48, :48]
    nucleus = np.hypot(rows - 24, columns - 24) < 8
    nucleus = cell_from_parts(1, (0, 0, 48, 48), nucleus, np.zeros_like(nucleus))
    rows, columns = (np.mgrid[:size, :size] + 0.5) * 48 / size - 0.5
    sure = (1 / (1 + np.exp(2 * (np.hypot(rows - 24, columns - 24) - 16)))).astype(np.float32)
    region = RegionProbability(nucleus, (0, 0, 48, 48), sure, (48, 48))
    first = cell_from_probability(region)
    assert first.area == pytest.approx(np.pi * 16**2, rel=0.03)
    for factor in (0.6, 0.3):
        unsure = replace(region, nucleus=replace(nucleus, score=0.5), probability=factor * sure)
        second = cell_from_probability(unsure)
        assert second.area == pytest.approx(first.area, rel=0.01)
        assert second.score == pytest.approx(0.5 * factor * first.score, rel=0.02)
    nothing = cell_from_probability(replace(region, probability=0.01 * sure))
    assert not nothing.cytoplasm.any()  # a probability near zero gives no cytoplasm
