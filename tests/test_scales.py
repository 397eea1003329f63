"""Scales: figure 5 and the oracles on the official annotation."""

import os

import numpy as np
import pytest

from segpc_nb.dataset import list_samples
from segpc_nb.scales import area_ratios, histogram_peaks, oracle_scores, ratio_histogram

with_data = pytest.mark.skipif(not os.environ.get("SEGPC_DATA"), reason="SEGPC_DATA points to no data set")


@pytest.fixture(scope="module")
def official():
    samples = list_samples()
    if len(samples) != 298:
        pytest.skip("SEGPC_DATA is not the official training set")
    return {sample.id: sample.cells() for sample in samples}, {
        sample.id: sample.image().shape[:2] for sample in samples
    }


@with_data
def test_oracles_of_the_official_annotation(official):
    scores = oracle_scores(*official)
    expected = {
        "nucleus as cell": 0.451,
        "nucleus dilated by half its radius": 0.573,
        "perfect map + components": 0.744,
        "cell clipped at scale 0.5": 0.805,
        "cell clipped at scale 1.0": 0.942,
        "cell clipped at scale 1.75": 0.995,
        "cell clipped at scale 2.6": 0.9996,
        "cell clipped at scale 3.0": 0.9999,
    }
    assert scores.to_dict() == pytest.approx(expected, abs=0.01)


@with_data
def test_ratios_of_the_official_annotation(official):
    ratios = area_ratios(official[0])
    assert np.quantile(ratios, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx(
        [0.07, 0.43, 1.07, 1.34, 1.64, 2.31], abs=0.03
    )
    assert len(histogram_peaks(*ratio_histogram(ratios))) < 4  # not the four peaks of figure 5


@pytest.mark.parametrize("places", [(0.5,), (0.5, 1.5), (0.3, 1.1, 2.2, 3.3)])
def test_peaks_are_found_where_they_are(places):
    ratios = np.concatenate([np.random.default_rng(0).normal(place, 0.07, 500) for place in places])
    assert histogram_peaks(*ratio_histogram(ratios)) == pytest.approx(places, abs=0.06)
