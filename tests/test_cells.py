"""Cells against full frames: whatever is done in a window must equal what it would be on the whole picture."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from segpc_nb.cells import (
    BACKGROUND,
    CYTOPLASM,
    NUCLEUS,
    Cell,
    cell_from_mask,
    cell_from_parts,
    decode_rle,
    encode_rle,
    intersections,
    iou_table,
    mask_from_cell,
    resize_cell,
    same_cell,
    window,
)

fast = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def random_mask(seed, shape):
    "An official mask with a blob somewhere, never empty."
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    top, left = (rng.integers(0, size) for size in shape)
    bottom, right = rng.integers(top, shape[0]) + 1, rng.integers(left, shape[1]) + 1
    mask[top:bottom, left:right] = rng.choice([BACKGROUND, CYTOPLASM, NUCLEUS], (bottom - top, right - left))
    mask[top, left] = rng.choice([CYTOPLASM, NUCLEUS])
    return mask


@fast
@given(seeds, sizes, st.integers(1, 5))
def test_masks_to_cells_and_back_for_overlapping_stacks(seed, shape, n):
    masks = [random_mask(seed + i, shape) for i in range(n)]
    cells = [cell_from_mask(mask, i) for i, mask in enumerate(masks)]
    for cell, mask in zip(cells, masks):
        assert np.array_equal(mask_from_cell(cell, shape), mask)
        assert cell.area == np.count_nonzero(mask)
        assert all(cell.mask.any(axis)[[0, -1]].all() for axis in (0, 1))  # tight


@fast
@given(seeds, sizes, st.tuples(*[st.integers(-20, 60)] * 2), sizes)
def test_window_is_the_slice_of_the_padded_frame(seed, shape, corner, size):
    mask = random_mask(seed, shape)
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    padded = np.pad(mask, 100)[box[0] + 100 : box[2] + 100, box[1] + 100 : box[3] + 100]
    nucleus, cytoplasm = window(cell_from_mask(mask, 1), box)
    assert np.array_equal(nucleus, padded == NUCLEUS) and np.array_equal(cytoplasm, padded == CYTOPLASM)


@fast
@given(seeds, sizes, st.tuples(*[st.integers(-30, 45)] * 2), sizes)
def test_parts_are_cut_at_the_border(seed, size, corner, shape):
    rng = np.random.default_rng(seed)
    nucleus, cytoplasm = rng.random((2, *size)) < 0.3
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    frame = np.zeros((2, 200, 200), bool)
    here = np.s_[box[0] + 50 : box[2] + 50, box[1] + 50 : box[3] + 50]
    frame[0][here], frame[1][here] = nucleus, cytoplasm & ~nucleus
    frame = frame[:, 50 : 50 + shape[0], 50 : 50 + shape[1]]
    if not frame.any():
        with pytest.raises(ValueError, match="no pixel inside"):
            cell_from_parts(1, box, nucleus, cytoplasm, shape)
        return
    cell = cell_from_parts(1, box, nucleus, cytoplasm, shape)
    assert np.array_equal(mask_from_cell(cell, shape), frame[0] * np.uint8(NUCLEUS) + frame[1] * np.uint8(CYTOPLASM))


@fast
@given(seeds, sizes, st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_resize_is_cv2_nearest_of_the_frame(seed, shape, new_shape):
    mask = random_mask(seed, shape)
    full = cv2.resize(mask, new_shape[::-1], interpolation=cv2.INTER_NEAREST)
    cell = resize_cell(cell_from_mask(mask, 1), shape, new_shape)
    assert np.array_equal(full, np.zeros(new_shape) if cell is None else mask_from_cell(cell, new_shape))


@pytest.mark.parametrize("shape", [(1536, 2040), (1920, 2560), (384, 512), (1080, 1440)])
def test_resize_from_the_cameras_to_the_official_grid(shape):
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([BACKGROUND, CYTOPLASM, NUCLEUS], np.uint8), shape)
    full = cv2.resize(mask, (1440, 1080), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(mask_from_cell(resize_cell(cell_from_mask(mask, 1), shape, (1080, 1440)), (1080, 1440)), full)


@fast
@given(seeds, sizes, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["mask", "nucleus", "cytoplasm"]))
def test_overlaps_equal_full_frames(seed, shape, n, m, part):
    masks = [random_mask(seed + i, shape) for i in range(n + m)]
    cells = [cell_from_mask(mask, i) for i, mask in enumerate(masks)]
    frames = [mask > 0 if part == "mask" else mask == (NUCLEUS if part == "nucleus" else CYTOPLASM) for mask in masks]
    shared = [[(a & b).sum() for b in frames[n:]] for a in frames[:n]]
    joint = [[(a | b).sum() for b in frames[n:]] for a in frames[:n]]
    assert np.array_equal(intersections(cells[:n], cells[n:], part), np.array(shared, int).reshape(n, m))
    expected = np.array(shared, float).reshape(n, m) / np.maximum(np.array(joint, float).reshape(n, m), 1)
    assert np.array_equal(iou_table(cells[:n], cells[n:], part), expected)


@fast
@given(seeds, sizes)
def test_run_lengths_are_cocos(seed, shape):
    mask = random_mask(seed, shape) > 0
    counts = encode_rle(mask)
    assert np.array_equal(decode_rle(counts, shape), mask)
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert coco.frPyObjects({"size": list(shape), "counts": counts}, *shape)["counts"] == packed["counts"]


def test_run_lengths_of_nothing_and_everything():
    assert encode_rle(np.zeros((2, 3), bool)) == [6]
    assert encode_rle(np.ones((2, 3), bool)) == [0, 6]


@fast
@given(seeds, sizes, st.integers(0, 5))
def test_slack_does_not_make_another_cell(seed, shape, slack):
    cell = cell_from_mask(random_mask(seed, shape), 1)
    top, left, bottom, right = cell.bbox
    box = (max(0, top - slack), max(0, left - slack), bottom + slack, right + slack)
    loose = Cell(1, box, *window(cell, box))
    assert same_cell(cell, loose) and same_cell(loose, cell)
    bottom, right = box[2:]
    away = Cell(1, (bottom, right, bottom + loose.shape[0], right + loose.shape[1]), loose.nucleus, loose.cytoplasm)
    assert not same_cell(away, loose)


def test_swapped_parts_are_another_cell():
    one, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    assert not same_cell(Cell(1, (0, 0, 2, 2), one, none), Cell(1, (0, 0, 2, 2), none, one))


def test_errors_name_the_fault():
    one, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    with pytest.raises(ValueError, match="cytoplasm is uint8"):
        Cell(1, (0, 0, 2, 2), one, none.astype(np.uint8))
    with pytest.raises(ValueError, match="empty or starts outside"):
        Cell(1, (2, 0, 2, 2), one, none)
    with pytest.raises(ValueError, match=r"holds \[7, 60\]"):
        cell_from_mask(np.array([[60, 20], [7, 40]], np.uint8), 1)
    with pytest.raises(ValueError, match="allowed: 'mask'"):
        intersections([Cell(1, (0, 0, 2, 2), one, none)], [Cell(1, (0, 0, 2, 2), one, none)], "rim")


def test_ratio():
    one, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    assert Cell(1, (0, 0, 2, 2), none, one).ratio == float("inf")
    assert Cell(1, (0, 0, 2, 2), one, none).ratio == 0
