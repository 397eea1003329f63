"""Figures: the right things at the right place, nothing shown, saved or changed behind the caller's back."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.path import Path
from scipy import ndimage

from segpc_nb.cells import Cell, cell_from_parts
from segpc_nb.plots import (
    CELL_COLORS,
    OUTLINE_COLORS,
    outlines,
    show_cells,
    show_masks,
    show_panel,
    show_picture,
    show_regions,
)
from segpc_nb.progress import show_history

SHAPE = (30, 40)
image = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
whole = np.hypot(np.arange(30)[:, None] - 8, np.arange(40) - 9) < 7
cell = cell_from_parts(1, (0, 0, 30, 40), np.roll(whole, 1, axis=1) & whole, whole)
crops = np.concatenate(
    [np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8), np.ones((3, 1, 16, 16), np.uint8)], 1
)
history = pd.DataFrame(
    {
        "epoch": [0, 1, 2],
        "train_loss": [3.0, 2, 1],
        "valid_loss": [3.0, 2, 2],
        "valid_iou": [0.1, 0.4, 0.3],
        "lr": [1.0, 1, 1],
        "seconds": [9.0, 9, 9],
    }
)

DRAW = {
    "picture": lambda ax=None: show_picture(image, ax),
    "cells": lambda ax=None: show_cells(image, [cell], ax, "title", numbers=True),
    "masks": lambda ax=None: show_masks([cell], SHAPE, ax),
    "history": lambda ax=None: show_history(history, ax),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No figure may pop up, and settings stay as they are."
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("plt.show was called"))
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("draw", DRAW.values(), ids=list(DRAW))
def test_given_axes_are_used_and_returned(draw):
    figure, ax = plt.subplots()
    assert draw(ax) is ax
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    assert draw().figure is not figure


@pytest.mark.parametrize("draw", DRAW.values(), ids=list(DRAW))
def test_the_same_call_gives_the_same_pixels(draw):
    pixels = []
    for seed in (1, 2):
        np.random.seed(seed)
        ax = draw()
        ax.figure.canvas.draw()
        pixels.append(np.asarray(ax.figure.canvas.buffer_rgba()).copy())
    assert np.array_equal(*pixels)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(-5, 30), st.integers(-5, 30)),
)
def test_outlines_enclose_exactly_the_mask(seed, size, corner):
    mask = (
        ndimage.binary_opening(np.random.default_rng(seed).random(size) < 0.6)
        if seed % 2
        else np.random.default_rng(seed).random(size) < 0.4
    )
    y, x = np.mgrid[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    points = np.stack([x.ravel(), y.ravel()], 1)
    crossings = np.zeros(mask.size, int)
    for line in outlines(mask, corner):
        assert np.array_equal(line[0], line[-1])  # closed
        crossings += Path(line).contains_points(points)
    assert np.array_equal((crossings % 2 == 1).reshape(size), mask)


def test_outlines_lie_on_the_cell_and_stay_inside_the_view():
    border = Cell(2, (25, 35, 30, 40), np.ones((5, 5), bool), np.zeros((5, 5), bool))
    ax = show_cells(image, [cell, border])
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 39.5), (29.5, -0.5))
    drawn = [line for part in ax.collections for line in part.get_segments()]
    top, left, bottom, right = cell.bbox
    assert np.allclose((drawn[0].min(0), drawn[0].max(0)), ((left - 0.5, top - 0.5), (right - 0.5, bottom - 0.5)))
    assert np.allclose((drawn[-1].min(0), drawn[-1].max(0)), ((34.5, 24.5), (39.5, 29.5)))


def test_empty_parts_and_no_cells_are_drawn():
    empty = np.zeros((4, 4), bool)
    for cells in ([], [Cell(1, (0, 0, 4, 4), empty, ~empty)], [Cell(1, (0, 0, 4, 4), ~empty, empty)]):
        show_cells(image, cells).figure.canvas.draw()
        show_masks(cells, SHAPE).figure.canvas.draw()
        assert [ax.get_title() for ax in show_panel(image, cells, [])] == [
            "picture",
            f"annotation, {len(cells)} cells",
            "prediction, 0 cells",
        ]


def test_masks_have_a_colour_per_id():
    def color(id):
        nucleus, rim = np.ones((3, 3), bool), np.zeros((3, 3), bool)
        return tuple(show_masks([Cell(id, (0, 0, 3, 3), nucleus, rim)], SHAPE).images[0].get_array()[1, 1])

    assert len({color(id) for id in range(len(CELL_COLORS))}) == len(CELL_COLORS)
    assert color(1) == color(1 + len(CELL_COLORS))


def test_outline_colours_differ_in_brightness():
    dark, bright = (np.dot(to_rgb(OUTLINE_COLORS[part]), (0.299, 0.587, 0.114)) for part in ("mask", "nucleus"))
    assert bright - dark > 0.6


@pytest.mark.parametrize(
    "wrong",
    [image / 255, image[..., 0], image.transpose(2, 0, 1), image.astype(np.int64), np.dstack([image, image[..., :1]])],
)
def test_wrong_pictures_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\) RGB; move the channels last"):
        show_picture(wrong)
    assert not plt.get_fignums()


def test_panel_takes_axes():
    axes = plt.subplots(1, 3)[1]
    assert show_panel(image, [cell], [], axes) is axes
    assert [len(ax.collections) for ax in axes] == [0, 2, 0]


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        torch.from_numpy,
        lambda crops: torch.cat([torch.from_numpy(crops[:, :3]) / 255, torch.from_numpy(crops[:, 3:])], 1),
    ],
)
def test_regions_as_bytes_and_as_batches(kind):
    targets = np.zeros((3, 1, 16, 16), np.float32)
    targets[:, :, 4:12, 4:12] = 0.7
    axes = show_regions(kind(crops), targets, torch.from_numpy(targets) * 0.5)
    assert axes.shape == (3, 3)
    assert np.array_equal(axes[0, 1].images[0].get_array(), crops[1, :3].transpose(1, 2, 0))
    assert [len(ax.collections[0].get_segments()) for ax in axes[:, 0]] == [1, 1, 0]  # found stays below one half
    assert [row[0].texts[0].get_text() for row in axes] == ["given", "annotated", "found"]
    assert show_regions(kind(crops)[:1], found=targets[:1]).shape == (2, 1)


@pytest.mark.parametrize("wrong", [crops[0], crops[:, :3], crops[:0], crops.transpose(0, 2, 3, 1)])
def test_wrong_regions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected \(n, 4, h, w\)"):
        show_regions(wrong)


def test_history_of_one_epoch_of_gaps_and_without_validation():
    ax = show_history(history[:1])
    assert len(ax.lines) == 3
    gaps = history.assign(valid_iou=[np.nan, 0.2, np.nan])
    assert show_history(gaps).lines[2].get_xdata()[0] == 1
    assert len(show_history(history.assign(valid_iou=np.nan)).lines) == 2
    ax = show_history(history[["train_loss", "lr"]])
    assert [line.get_label() for line in ax.lines] == ["train_loss"]
    assert len(ax.figure.axes) == 1
    for wrong in (history[:0], history[["lr"]]):
        with pytest.raises(ValueError, match="expected epochs with train_loss"):
            show_history(wrong)
