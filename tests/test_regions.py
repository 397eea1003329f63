"""Regions: crop and paste are inverse wherever nothing is resized, the training items are what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segpc_nb.cells import cell_from_parts, window
from segpc_nb.grids import paste_region, resize_mask
from segpc_nb.regions import crop_regions, nucleus_box, picture_window, region_box
from segpc_nb.training_data import CellRegions, RegionOptions, match_nuclei

SHAPE = (40, 60)
PICTURE = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)


@st.composite
def square_nuclei(draw):
    "A cell whose nucleus has a square box somewhere in the picture, corners and borders included."
    side = draw(st.integers(1, 16))
    top = draw(st.sampled_from([0, SHAPE[0] - side]) | st.integers(0, SHAPE[0] - side))
    left = draw(st.sampled_from([0, SHAPE[1] - side]) | st.integers(0, SHAPE[1] - side))
    nucleus = np.random.default_rng(draw(st.integers(0, 99))).random((side, side)) < 0.6
    np.fill_diagonal(nucleus, True)  # touches all four sides
    return cell_from_parts(1, (top, left, top + side, left + side), nucleus, np.zeros_like(nucleus))


@settings(max_examples=200, deadline=None)
@given(square_nuclei(), st.floats(0, 4))
def test_crop_and_paste_is_the_identity_at_native_size(cell, scale):
    side = region_box(nucleus_box(cell), scale)[2] - region_box(nucleus_box(cell), scale)[0]
    crops, (box,) = crop_regions(PICTURE, [cell], scale, side)
    for channel in range(3):
        values, (top, left, bottom, right) = paste_region(crops[0, channel].astype(np.float32), box, SHAPE)
        assert np.array_equal(values, PICTURE[top:bottom, left:right, channel])
    values, inside = paste_region(crops[0, 3].astype(np.float32), box, SHAPE)
    assert np.array_equal(values > 0.5, window(cell, inside)[0])
    assert (values > 0.5).sum() == cell.nucleus.sum()  # all of the nucleus is in its region


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(-80, 80), st.integers(-80, 80), st.integers(1, 70), st.integers(1, 70)))
def test_a_window_is_a_slice_of_the_picture_in_a_sea_of_zeros(place):
    top, left, height, width = place
    sea = np.pad(PICTURE, ((200, 200), (200, 200), (0, 0)))
    expected = sea[200 + top : 200 + top + height, 200 + left : 200 + left + width]
    assert np.array_equal(picture_window(PICTURE, (top, left, top + height, left + width)), expected)


@settings(max_examples=60, deadline=None)
@given(square_nuclei(), st.sampled_from([0.5, 1.75, 3.0]), st.integers(16, 48))
def test_a_resized_region_keeps_place_and_size(cell, scale, size):
    crops, (box,) = crop_regions(PICTURE, [cell], scale, size)
    values, inside = paste_region(np.ones((size, size), np.float32), box, SHAPE)
    assert values.shape == (inside[2] - inside[0], inside[3] - inside[1]) and np.allclose(values, 1)
    assert inside[0] >= 0 and inside[1] >= 0 and inside[2] <= SHAPE[0] and inside[3] <= SHAPE[1]
    assert crops.shape == (1, 4, size, size) and set(np.unique(crops[:, 3])) <= {0, 1}


def test_the_nucleus_decides_the_region_not_the_cell():
    nucleus, cytoplasm = np.zeros((2, 30, 30), bool)
    nucleus[4:10, 5:13] = cytoplasm[2:28, 2:28] = True
    cell = cell_from_parts(3, (5, 5, 35, 35), nucleus, cytoplasm)
    assert nucleus_box(cell) == (9, 10, 15, 18)
    bare = cell_from_parts(3, (5, 5, 35, 35), np.zeros_like(nucleus), cytoplasm)
    with pytest.raises(ValueError, match="cell 3 has no nucleus"):
        crop_regions(PICTURE, [bare], 1.0, 32)


def disc(id, row, column, radius, rim):
    rows, columns = np.mgrid[:40, :60]
    distance = np.hypot(rows - row, columns - column)
    return cell_from_parts(id, (0, 0, 40, 60), distance < radius, distance < radius + rim)


def samples():
    truth = {"1": [disc(1, 12, 12, 5, 4), disc(2, 30, 45, 6, 5)], "2": [disc(1, 38, 2, 5, 4)], "3": []}
    return [
        SimpleNamespace(id=id, image=lambda: PICTURE, cells=lambda cells=cells: cells) for id, cells in truth.items()
    ]


def test_items_hold_the_whole_cell_or_nothing():
    nuclei = {"1": [disc(1, 12, 14, 5, 0), disc(2, 10, 50, 4, 0)], "2": [disc(1, 37, 3, 4, 0)]}
    regions = CellRegions(samples(), nuclei, RegionOptions(1.75, 32))
    assert len(regions) == 3
    assert [bool(target.any()) for _, target in regions] == [True, False, True]
    for crop, target in regions:
        assert crop.shape == (4, 32, 32) and target.shape == (1, 32, 32)
        assert crop.dtype == target.dtype == torch.float32
        assert 0 <= crop.min() and crop.max() <= 1 and set(target.unique().tolist()) <= {0.0, 1.0}
    whole = window(samples()[0].cells()[0], region_box(nucleus_box(nuclei["1"][0]), 1.75))
    assert torch.equal(regions[0][1][0] > 0, torch.from_numpy(resize_mask(whole[0] | whole[1], (32, 32))))


def test_missed_cells_join_with_their_true_nuclei():
    nuclei = {
        "1": [disc(1, 12, 14, 5, 0), disc(2, 10, 50, 4, 0)]
    }  # cell 2 of picture 1 and the cell of picture 2 are missed
    regions = CellRegions(samples(), nuclei, RegionOptions(1.75, 32, missed=True))
    assert [bool(target.any()) for _, target in regions] == [True, False, True, True]
    true = CellRegions(samples(), None, RegionOptions(1.75, 32))
    assert all(
        torch.equal(a, b)
        for mine, theirs in zip((regions[2], regions[3]), (true[1], true[2]))
        for a, b in zip(mine, theirs)
    )


def test_transform_moves_picture_nucleus_and_target_together():
    plain = CellRegions(samples(), None, RegionOptions(1.75, 32, margin=0.25), transform=lambda *both: both)
    flipped = CellRegions(
        samples(),
        None,
        RegionOptions(1.75, 32, margin=0.25),
        transform=lambda image, mask: (image.flip(-1), mask.flip(-1)),
    )
    assert len(plain) == 3
    for (crop, target), (other, target_flipped) in zip(plain, flipped):
        assert torch.equal(crop.flip(-1), other) and torch.equal(target.flip(-1), target_flipped)


def test_jitter_is_seeded_by_torch_and_touches_the_mask_alone():
    regions = CellRegions(samples(), None, RegionOptions(3.0, 48, jitter=True))
    torch.manual_seed(5)
    first = [regions[0][0] for _ in range(6)]
    torch.manual_seed(5)
    assert all(torch.equal(a, regions[0][0]) for a in first)
    assert all(torch.equal(first[0][:3], crop[:3]) for crop in first)
    assert len({crop[3].sum().item() for crop in first}) > 1
    assert all(crop[3].any() for crop in first)


def test_no_nuclei_no_items_and_foreign_nuclei_are_refused():
    assert len(CellRegions(samples(), {"3": []}, RegionOptions(1.0, 32))) == 0
    with pytest.raises(ValueError, match="none of the 3 samples"):
        CellRegions(samples(), {"7": []}, RegionOptions(1.0, 32))


def test_partners_of_fragments_and_clumps():
    truth = [disc(1, 12, 12, 6, 3), disc(2, 12, 24, 6, 3)]
    fragment, clump, speck = disc(5, 12, 9, 2.5, 0), disc(6, 12, 15, 9, 0), disc(7, 35, 55, 2, 0)
    assert [cell and cell.id for cell in match_nuclei([fragment, clump, speck], truth)] == [1, 1, None]
