"""The pipeline with arithmetic instead of networks: places, sizes, batches, rules, bundles."""

import json
from dataclasses import replace
from itertools import chain

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.draw import ellipse
from skimage.feature import peak_local_max
from skimage.measure import label
from skimage.segmentation import watershed

from segpc_nb.aggregation import cell_from_probability, single_scale
from segpc_nb.cells import Cell, cell_from_parts, iou_table
from segpc_nb.config import SELECTIONS, BundleConfig
from segpc_nb.inference import predict_probabilities
from segpc_nb.models import build_network, load_network
from segpc_nb.nuclei import find_nuclei, split_touching
from segpc_nb.pipeline import Segmenter, aggregate, load_bundle, predict_regions
from segpc_nb.synthetic import make_picture

SCALES = (0.5, 1.75, 2.6, 3.0)
CONFIG = BundleConfig((96, 128), SCALES, (48, 48, 64, 64), (0.8, 2.5, 4.0))


def dark_is_nucleus(images):
    return 40 * (0.35 - images[:, 1:2])


def coloured_is_cell(crops):
    return 40 * (0.7 - crops[:, 1:2])


SEGMENTER = Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, coloured_is_cell), CONFIG, pixels=3 * 48 * 48)


def drawn(rng, shape=(192, 256), cells=4):
    "A picture with discs in discs, apart from each other, and what was drawn."
    image, truth = np.full((*shape, 3), (232, 215, 225), np.uint8), []
    rows, columns = np.mgrid[: shape[0], : shape[1]] / (shape[0] / 96)
    free = np.ones(shape, bool)
    for _ in range(100):
        row, column, radius = rng.uniform(0, 96), rng.uniform(0, 128), rng.uniform(4, 8)
        distance = np.hypot(rows - row, columns - column)
        nucleus, cell = distance < radius, distance < radius * rng.uniform(1.2, 2)
        if (
            len(truth) < cells
            and nucleus.sum() > 0.4 * radius**2 * (shape[0] / 96) ** 2
            and free[distance < 2.2 * radius].all()
        ):
            image[cell], image[nucleus] = (150, 140, 200), (90, 40, 130)
            free[distance < 3 * radius] = False
            truth.append(cell_from_parts(len(truth) + 1, (0, 0, *shape), nucleus, cell))
    return image, truth


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(96, 128), (144, 192), (288, 384)]))
def test_drawn_cells_are_found_at_every_size_of_picture(seed, shape):
    image, truth = drawn(np.random.default_rng(seed), shape)
    nuclei = SEGMENTER.nuclei(image)
    assert len(nuclei) == len(truth)
    cells = SEGMENTER.segment(image)
    assert sorted(cell.id for cell in cells) == list(range(1, len(truth) + 1))
    assert iou_table(truth, cells, "nucleus").max(1).min() > 0.75
    assert iou_table(truth, SEGMENTER.segment(image, "keep-all")).max(1).min() > 0.75
    for cell in cells:
        assert not (cell.nucleus & cell.cytoplasm).any() and cell.nucleus.any()
        assert 0 <= cell.bbox[0] and 0 <= cell.bbox[1] and cell.bbox[2] <= shape[0] and cell.bbox[3] <= shape[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.tuples(*[st.floats(-1, 4)] * 3), st.floats(0, 1))
def test_lazy_evaluation_gives_the_same_cells(seed, upper, min_score):
    rng = np.random.default_rng(seed)
    image, _ = drawn(rng)
    config = BundleConfig((96, 128), SCALES, (48, 48, 64, 64), upper, min_score=min_score)
    segmenter = Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, coloured_is_cell), config)
    nuclei = [
        replace(nucleus, score=rng.random()) for nucleus in segmenter.nuclei(image, "field")
    ]  # some can't reach the least score
    candidates = segmenter.candidates(image, nuclei)
    for select in SELECTIONS:
        lazy, eager = segmenter.segment(image, select, nuclei=nuclei), aggregate(candidates, select, config)
        assert [(c.id, c.scale, c.bbox, c.score) for c in lazy] == [(c.id, c.scale, c.bbox, c.score) for c in eager]
        assert all(
            np.array_equal(a.nucleus, b.nucleus) and np.array_equal(a.cytoplasm, b.cytoplasm)
            for a, b in zip(lazy, eager)
        )


def test_nuclei_below_the_least_score_are_not_shown_to_stage_two():
    def unasked(crops):
        raise AssertionError("asked about a nucleus that can't be reported")

    image, _ = drawn(np.random.default_rng(0))
    segmenter = Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, unasked), replace(CONFIG, min_score=0.5))
    doubtful = [replace(nucleus, score=0.4) for nucleus in segmenter.nuclei(image)]
    assert [segmenter.segment(image, select, nuclei=doubtful) for select in ("paper", "fuse", "nms")] == [[], [], []]
    with pytest.raises(AssertionError, match="can't be reported"):
        segmenter.segment(image, "keep-all", nuclei=doubtful)


def test_later_scales_are_asked_only_about_refused_nuclei():
    asked = dict.fromkeys(SCALES, 0)

    def counting(scale):
        def network(crops):
            asked[scale] += len(crops)
            return coloured_is_cell(crops)

        return network

    image, truth = drawn(np.random.default_rng(0))
    config = BundleConfig((96, 128), SCALES, (48,) * 4, (9.0, 9.0, 9.0))
    Segmenter(dark_is_nucleus, {scale: counting(scale) for scale in SCALES}, config).segment(image)
    assert list(asked.values()) == [len(truth), 0, 0, 0]


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_picture_without_nuclei_has_no_cells(select):
    assert SEGMENTER.segment(np.full((50, 60, 3), 230, np.uint8), select) == []
    blank = np.full((50, 60, 3), 230, np.uint8)
    assert SEGMENTER.candidates(blank, SEGMENTER.nuclei(blank)) == []


def test_given_nuclei_are_used_and_their_cytoplasm_is_not():
    image, truth = drawn(np.random.default_rng(1))
    cells = SEGMENTER.segment(image, nuclei=truth)
    assert [cell.id for cell in cells] == [cell.id for cell in truth]
    assert np.diag(iou_table(truth, cells, "nucleus")).min() == 1
    blind = Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, lambda crops: 0 * crops[:, :1] - 9), CONFIG)
    assert all(not cell.cytoplasm.any() and cell.score < 0.01 for cell in blind.segment(image, nuclei=truth))


def test_batches_do_not_matter_and_scales_stay_in_order():
    image, truth = drawn(np.random.default_rng(2))
    one, many = (
        Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, coloured_is_cell), CONFIG, size).candidates(
            image, SEGMENTER.nuclei(image)
        )
        for size in (1, 64)
    )
    assert [[c.scale for c in scales] for scales in one] == [list(SCALES)] * len(truth)
    for a, b in zip(chain(*one), chain(*many)):
        assert np.array_equal(a.probability, b.probability) and a.box == b.box
    assert [cell.scale for cell in single_scale(one, 2)] == [2.6] * len(truth)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_nuclei_on_the_grid_itself_are_the_components(seed, split):
    probability = ndimage.gaussian_filter(np.random.default_rng(seed).random((50, 60)), 2)
    probability = ((probability - probability.mean()) / probability.std() / 6 + 0.5).clip(0, 1).astype(np.float32)
    nuclei = find_nuclei(probability, 0.5, 0.004, split=split)
    square = np.ones((3, 3))
    mask = ndimage.binary_dilation(ndimage.binary_erosion(probability > 0.5, square, border_value=1), square)
    mask = ndimage.binary_fill_holes(mask)
    labels = split_touching(mask) if split else ndimage.label(mask, square)[0]
    drawn_ = np.zeros_like(labels)
    for cell in nuclei:
        top, left, bottom, right = cell.bbox
        assert not drawn_[top:bottom, left:right][cell.nucleus].any()  # nuclei never overlap
        drawn_[top:bottom, left:right][cell.nucleus] = cell.id
        assert 0 < cell.score <= 1 and not cell.cytoplasm.any()
    large = np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) >= 0.004 * 3000)[1:])
    assert np.array_equal(drawn_ > 0, large)


@pytest.mark.parametrize("shape", [(100, 150), (33, 47), (20, 30), (75, 75)])
def test_nuclei_keep_their_place_when_the_picture_has_another_size(shape):
    rows, columns = np.mgrid[:40, :60]
    probability = (1 / (1 + np.exp(np.hypot(rows - 12, columns - 41) - 8))).astype(np.float32)
    (nucleus,) = find_nuclei(probability, shape=shape)
    y, x = np.argwhere(nucleus.nucleus).mean(0) + nucleus.bbox[:2] + 0.5
    assert y / shape[0] == pytest.approx(12.5 / 40, abs=0.01) and x / shape[1] == pytest.approx(41.5 / 60, abs=0.01)
    assert nucleus.area / (shape[0] * shape[1]) == pytest.approx(np.pi * 64 / 2400, rel=0.06)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_pieces_are_those_of_one_watershed_over_the_whole_mask(seed, count):
    rng, mask = np.random.default_rng(seed), np.zeros((120, 160), bool)
    for _ in range(count):
        mask[ellipse(*rng.uniform(0, (120, 160)), *rng.uniform(4, 18, 2), mask.shape, rng.uniform(0, np.pi))] = True
    found, components = split_touching(mask), label(mask, connectivity=1)
    distance = cv2.GaussianBlur(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5), (0, 0), 1)
    radii = [distance[components == number].max() for number in range(1, components.max() + 1)]
    peaks = peak_local_max(
        distance, min_distance=max(1, round(0.8 * np.median(radii))), labels=components, exclude_border=False
    )
    seeds = np.zeros(mask.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    expected = watershed(-distance, seeds, mask=mask)
    pairs, shared = np.unique(np.stack([found[mask], expected[mask]]), axis=1, return_counts=True)
    assert np.array_equal(found > 0, mask) and found.max() == expected.max() == len(peaks)
    order = [pairs[1, pairs[0] == piece][shared[pairs[0] == piece].argmax()] for piece in range(1, len(peaks) + 1)]
    assert sorted(order) == list(range(1, len(peaks) + 1))  # one to one
    assert (
        sum(shared[pairs[1] == np.array([0, *order])[pairs[0]]]) > 0.98 * mask.sum()
    )  # ties on a ridge may fall either way


def test_split_nuclei_do_not_overlap_after_stretching():
    rows, columns = np.mgrid[:40, :60]
    probability = np.max([1 / (1 + np.exp(np.hypot(rows - 20, columns - c) - 9)) for c in (21, 38)], 0).astype(
        np.float32
    )
    assert len(find_nuclei(probability)) == 1
    a, b = find_nuclei(probability, shape=(160, 240), split=True)
    assert iou_table([a], [b])[0, 0] == 0
    together = find_nuclei(probability, shape=(160, 240))[0].area
    assert a.area + b.area == pytest.approx(together, rel=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 3)),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((0, 9, 3), np.uint8),
        "a.png",
        None,
    ],
)
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(ValueError, match=r"image: .*; expected a uint8 array"):
        SEGMENTER.segment(wrong)


def test_broken_networks_are_noticed():
    image, truth = drawn(np.random.default_rng(1))
    with pytest.raises(ValueError, match="NaN"):
        Segmenter(lambda images: images[:, :1] * np.nan, {}, BundleConfig((96, 128))).nuclei(image)
    with pytest.raises(ValueError, match="output of shape"):
        Segmenter(dark_is_nucleus, dict.fromkeys(SCALES, lambda crops: crops), CONFIG).segment(image, nuclei=truth)
    with pytest.raises(ValueError, match="one network per scale"):
        Segmenter(dark_is_nucleus, {0.5: coloured_is_cell}, CONFIG)
    with pytest.raises(ValueError, match="allowed: paper, keep-all, fuse, nms"):
        SEGMENTER.segment(image, "all")
    with pytest.raises(ValueError, match="one per scale except the last"):
        Segmenter(
            dark_is_nucleus, dict.fromkeys(SCALES, coloured_is_cell), BundleConfig((96, 128), SCALES, (48,) * 4)
        ).segment(image)


def test_dropout_and_batch_statistics_are_off():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.9)).train()
    Segmenter(network, {}, BundleConfig((8, 8)))
    assert not network.training
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8)
    assert np.array_equal(
        predict_probabilities(network, images, pixels=1)[2], predict_probabilities(network, images[2:3])[0]
    )


@pytest.mark.parametrize("at_once", [1, 3, 4, 7, 100])
def test_mirror_images_may_fall_into_different_calls(at_once):
    torch.manual_seed(0)
    network, sizes = torch.nn.Conv2d(4, 1, 5, padding=2).eval(), []
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 12, 9)).astype(np.uint8)
    images[:, 3] //= 128
    scaled = torch.from_numpy(images / np.array([255, 255, 255, 1])[:, None, None]).float()
    with torch.no_grad():
        views = [network(scaled.flip(axes)).sigmoid().flip(axes) for axes in ([], [2], [3], [2, 3])]
    found = predict_probabilities(
        lambda batch: sizes.append(len(batch)) or network(batch), images, True, at_once * 12 * 9
    )
    assert np.allclose(found, torch.stack(views).mean(0), atol=1e-6)
    assert sum(sizes) == 20 and max(sizes) == min(at_once, 20)


class Judge(torch.nn.Module):
    "Everything is cell; annotated is what is dark in the middle of its crop."

    def __init__(self):
        super().__init__()
        self.annotation_head = torch.nn.Identity()

    def forward(self, crops):
        middle = crops[:, :3, 18:-18, 18:-18].mean((1, 2, 3))
        return torch.stack([crops[:, 0] * 0 + 9, (6 - 30 * middle)[:, None, None].expand(crops[:, 0].shape)], 1)


def test_the_annotation_head_decides_the_score_and_not_the_outline():
    image = np.full((96, 128, 3), 230, np.uint8)
    image[30:50, 20:40], image[30:50, 80:100] = 20, 70
    config = replace(CONFIG, scales=(1.75,), region_sizes=(48,), upper_ratios=(), min_score=0.3)
    config = replace(config, score_weights=(0.0, 0.0, 1.0))
    segmenter = Segmenter(dark_is_nucleus, {1.75: Judge()}, config)
    nuclei = [
        replace(nucleus, score=0.01) for nucleus in segmenter.nuclei(image, "field")
    ]  # below min_score, which a judged cell may exceed
    assert len(nuclei) == 2
    (dark,), (light,) = segmenter.candidates(image, nuclei)
    assert dark.annotated > 0.9 and light.annotated < dark.annotated
    assert dark.cell.score == dark.score and np.isclose(dark.score, dark.annotated, atol=1e-3)
    assert abs(dark.cell.area - light.cell.area) <= 8  # the outline does not depend on the answer
    kept = segmenter.segment(image, nuclei=nuclei)
    assert [cell.id for cell in kept] == [cell.id for cell in (dark.cell, light.cell) if cell.score >= 0.3]
    segmenter.config = replace(config, score_weights=(0.0, 1.0, 0.0))  # now stage one alone decides
    assert np.allclose([c.cell.score for (c,) in segmenter.candidates(image, nuclei)], 0.01, atol=1e-6)
    segmenter.config = replace(config, score_weights=())  # not fitted: as without the head
    assert all(c.cell.score <= 0.01 for (c,) in segmenter.candidates(image, nuclei))
    assert segmenter.segment(image, nuclei=nuclei) == []


def test_the_lowest_scale_judges_and_the_others_see_only_what_is_reported():
    image = np.full((96, 128, 3), 230, np.uint8)
    image[30:50, 20:40], image[30:50, 80:100] = 20, 70
    config = replace(CONFIG, scales=(0.5, 1.75), region_sizes=(48, 48), upper_ratios=(-1.0,), min_score=0.9)
    config, seen = replace(config, score_weights=(0.0, 0.0, 1.0)), []

    def outline(crops):
        seen.append(len(crops))
        return crops[:, :1] * 0 + 9

    segmenter = Segmenter(dark_is_nucleus, {0.5: Judge(), 1.75: outline}, config)
    dark, light = segmenter.candidates(image, segmenter.nuclei(image, "field"))
    assert [c.cell.score for c in dark] == [dark[0].score] * 2 and dark[0].score > 0.9 > light[0].score
    seen.clear()
    (cell,) = segmenter.segment(image, nucleus_px="field")
    assert seen == [1]  # the second nucleus is below the least score
    assert (cell.scale, cell.score, cell.area) == (1.75, dark[1].cell.score, dark[1].cell.area)
    assert len(segmenter.segment(image, "keep-all", "field")) == 4
    segmenter = Segmenter(dark_is_nucleus, {0.5: outline, 1.75: Judge()}, config)
    with pytest.raises(ValueError, match=r"scale 0\.5 has no annotation head"):
        segmenter.segment(image, nucleus_px="field")


def test_a_bundle_read_again_gives_the_same_cells(tmp_path):
    torch.manual_seed(0)
    networks = {scale: build_network("unet", in_channels=4, widths=(4, 8)) for scale in SCALES}
    first = Segmenter(build_network("unet", widths=(4, 8)), networks, CONFIG)
    first.save_bundle(tmp_path / "bundle")
    again = Segmenter.from_bundle(tmp_path / "bundle")
    assert again.config == CONFIG
    image, truth = drawn(np.random.default_rng(4))
    for a, b in zip(chain(*first.candidates(image, truth)), chain(*again.candidates(image, truth))):
        assert np.array_equal(a.probability, b.probability)


def test_networks_saved_to_give_probabilities_give_the_same_cells(tmp_path):
    torch.manual_seed(0)
    networks = {scale: build_network("unet", in_channels=4, widths=(4, 8)) for scale in SCALES}
    first = Segmenter(build_network("unet", widths=(4, 8)), networks, CONFIG)
    first.save_bundle(tmp_path)
    for file in tmp_path.glob("*/config.json"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved["network"]["activation"] = "sigmoid"
        file.write_text(json.dumps(saved), encoding="utf-8")
    assert load_network(tmp_path / "nucleus").activation == "sigmoid"
    again = load_bundle(tmp_path)
    image, truth = drawn(np.random.default_rng(4))
    assert [(cell.bbox, cell.area) for cell in again.nuclei(image)] == [
        (cell.bbox, cell.area) for cell in first.nuclei(image)
    ]
    for a, b in zip(chain(*first.candidates(image, truth)), chain(*again.candidates(image, truth))):
        assert np.array_equal(a.probability, b.probability)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "update segpc_nb"),
        ({"colour": 1}, "colour"),
        ({"min_score": "high"}, "min_score"),
        (None, "bundle.json: is not valid"),
    ],
)
def test_broken_bundles_are_refused(tmp_path, change, message):
    text = json.dumps({"nucleus_size": [96, 128]} | change) if change else "{"
    (tmp_path / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path)


def test_unfinished_bundles_are_none(tmp_path):
    with pytest.raises(ValueError, match="holds no bundle"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text('{"nucleus_size": [96, 128]}', encoding="utf-8")
    with pytest.raises(ValueError, match="nucleus: holds no network"):
        load_bundle(tmp_path)


def test_the_crops_know_the_nucleus_as_well_as_the_picture_does():
    image, cells = make_picture(np.random.default_rng(5))
    image = np.kron(image, np.ones((4, 4, 1), np.uint8))
    nuclei = [
        Cell(
            c.id,
            tuple(4 * side for side in c.bbox),
            np.kron(c.nucleus, np.ones((4, 4), bool)),
            np.zeros(np.multiply(4, c.nucleus.shape), bool),
        )
        for c in cells
    ]
    speck = Cell(
        99, (100, 100, 101, 500), np.eye(1, 400, 7, dtype=bool), np.zeros((1, 400), bool)
    )  # nothing is left of it in its crop
    for scale in (0.5, 2.6):
        found = predict_regions(
            lambda crops: 40 * (crops[:, 3:] + 0.5 * (crops[:, 1:2] < 0.7) - 0.25), image, [*nuclei, speck], scale, 96
        )
        for c in found:
            again = cell_from_probability(c, 0.5)  # a candidate keeps no `grid_nucleus`
            assert c.cell.bbox == again.bbox and c.cell.score == again.score
            assert (c.cell.nucleus == again.nucleus).all() and (c.cell.cytoplasm == again.cytoplasm).all()
