"""The networks that come with the package, held to a floor."""

import os

import numpy as np
import pytest

from segpc_nb.cells import iou_table
from segpc_nb.dataset import find_dataset, split_samples
from segpc_nb.label_shift import as_annotated
from segpc_nb.metrics import evaluate_cells
from segpc_nb.pipeline import SHIPPED, load_bundle
from segpc_nb.synthetic import make_picture

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "bundle.json").exists(), reason="this copy comes without trained networks"
)


def test_drawn_plasma_cells_are_found_and_not_swallowed():
    "Real networks on drawn smears, which they have never seen: nuclei are found, and cells are larger than these."
    segmenter, found, larger = load_bundle(), [], []
    for number in range(3):
        image, truth = make_picture(np.random.default_rng(number))
        cells = segmenter.segment(image, nucleus_px="field")
        overlap = iou_table(truth, cells, "nucleus")
        found += overlap.max(1, initial=0).tolist()
        larger += [cell.area > cell.nucleus.sum() for cell in cells]
    assert sum(iou > 0.5 for iou in found) >= 0.75 * len(found)
    assert sum(larger) >= 0.9 * len(larger)


@pytest.mark.skipif(not os.environ.get("SEGPC_DATA"), reason="needs SEGPC_DATA")
def test_validation_pictures_are_segmented_as_well_as_when_the_networks_were_shipped():
    samples = split_samples(find_dataset()).valid[:10]
    segmenter, truth, found, shapes = load_bundle(), {}, {}, {}
    for sample in samples:
        image = sample.image()
        shapes[sample.id], truth[sample.id] = image.shape[:2], sample.cells()
        found[sample.id] = as_annotated(segmenter.segment(image, nucleus_px="field"), sample.id, image.shape[1])
    scores = evaluate_cells(truth, found, shapes, n_boot=0)
    assert scores["official"] > 0.83 and scores["pq"] > 0.68 and scores["nucleus_iou"] > 0.95, scores
