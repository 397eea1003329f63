"""Grids: shrinking is the mean over areas, masks are cut at one half, holes are filled, outlines survive stretching."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segpc_nb.grids import (
    fill_holes,
    paste_region,
    resize_image,
    resize_mask,
    shrink_image,
    signed_surface,
    stretch_window,
)

seeds = st.integers(0, 10_000).map(np.random.default_rng)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_shrinking_is_the_mean_and_masks_are_cut_at_half(factor):
    window_ = np.random.default_rng(1).random((6 * factor, 4 * factor)).astype(np.float32)
    mean = window_.reshape(6, factor, 4, factor).mean((1, 3))
    assert np.allclose(resize_image(window_, (6, 4)), mean, atol=1e-5)
    assert resize_mask(np.repeat(np.repeat(mean > 0.5, factor, 0), factor, 1), (6, 4)).tolist() == (mean > 0.5).tolist()


def row_weights(sides, count):
    "Weight of each source row in each output row, (count, sides)."
    edges, rows = np.arange(count + 1) * sides / count, np.arange(sides)
    return np.clip(np.minimum(edges[1:, None], rows + 1) - np.maximum(edges[:-1, None], rows), 0, None) * count / sides


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 24), st.floats(1, 9), st.floats(1, 9))
def test_large_regions_are_averaged_and_smaller_ones_resized_directly(side, down, right):
    rows, columns = np.mgrid[: int(side * down), : int(side * right)]
    region = (
        np.stack([128 + 120 * np.sin(rows / 19) * np.cos(columns / 23 + phase) for phase in range(3)], 2)
        .round()
        .astype(np.uint8)
    )
    crop = shrink_image(region, (side, side))
    assert (crop.shape, crop.dtype) == ((side, side, 3), np.uint8)
    if min(region.shape[:2]) < 4 * side:
        assert np.array_equal(crop, resize_image(region, (side, side)))
    else:
        mean = np.einsum(
            "ih,hwc,jw->ijc",
            row_weights(region.shape[0], side),
            region,
            row_weights(region.shape[1], side),
            optimize=True,
        )
        away = np.abs(crop - mean)
        assert away[:-1, :-1].mean() < 0.7 and away[:-1, :-1].max() < 3
        assert away.max() < 16  # the last row and column lack up to 3 px of 8


@pytest.mark.parametrize("factor", [4, 8, 12])
def test_halving_only_rounds_where_pixels_fit(factor):
    region = np.random.default_rng(2).integers(0, 256, (20 * factor, 16 * factor, 3)).astype(np.uint8)
    mean = region.reshape(20, factor, 16, factor, 3).mean((1, 3))
    assert np.abs(shrink_image(region, (20, 16)) - mean).max() < 0.5 * np.log2(factor) + 0.5
    half = np.repeat(np.repeat(mean[..., 0] > 128, factor, 0), factor, 1)
    assert np.array_equal(resize_mask(half, (20, 16)), mean[..., 0] > 128)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_holes_are_filled_as_scipy_fills_them(rng):
    mask = ndimage.gaussian_filter(rng.random((30, 40)), 1) > 0.5
    # 8-connected outlines enclose what 4-connected background paths can't leave
    assert np.array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_a_surface_that_is_not_stretched_gives_its_mask_back(rng):
    mask, height = rng.random((12, 17)) < 0.5, rng.normal(size=(12, 17)).astype(np.float32)
    surface, box = stretch_window(signed_surface(height, mask), (0, 0), mask.shape, (0, 0, *mask.shape), mask.shape)
    assert box == (0, 0, 12, 17) and np.array_equal(surface > 0, mask)


def test_a_box_outside_the_picture_is_refused():
    with pytest.raises(ValueError, match="lies outside the picture of 20 x 25 px; use the shape"):
        paste_region(np.ones((8, 8), np.float32), (30, 30, 40, 40), (20, 25))
