"""The released way: every quirk against a literal oracle, the whole against what the unmodified code answered."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.smear import draw_smear
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segpc_nb.aggregation import RELEASED_LIMITS
from segpc_nb.cells import Cell, mask_from_cell
from segpc_nb.released import (
    ReleasedSegmenter,
    clean_mask,
    fill_tight_holes,
    fit_region,
    nonzero_box,
    plausible,
    released_cell,
    released_equalization,
    released_mask,
    released_nuclei,
    released_region,
)
from segpc_nb.submission import submission_lines

GOLDEN = json.loads((Path(__file__).parent / "golden" / "released.json").read_text())  # see golden/README.md
SCALES = (0.5, 1.75, 2.6, 3.0)
SQUARE = np.ones((3, 3))


def above(condition):
    "Logits of a network that is a threshold."
    return torch.where(condition, 4.0, -4.0)


def dark(images):
    return above((images[:, :1] < 0.5) & (images[:, 1:2] < 0.45))


def tinted(limit):
    return lambda crops: above((crops[:, 1:2] > 0) & (crops[:, 1:2] < limit))


def disc(shape, row, column, radius):
    return np.hypot(np.arange(shape[0])[:, None] - row, np.arange(shape[1]) - column) < radius


def nucleus_at(shape, row, column, radius):
    mask = disc(shape, row, column, radius)
    (place,) = ndimage.find_objects(mask.astype(int))
    box = (place[0].start, place[1].start, place[0].stop, place[1].stop)
    return Cell(1, box, mask[place], np.zeros_like(mask[place]))


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (*shape, 3)).astype(np.uint8)


# -- against the unmodified code --------------------------------------------------------------------------------------
# golden/released.json is from the authors' notebook, its networks replaced by the thresholds `dark` and `tinted`, run
# on the picture that golden/smear.py draws again from its seed; masks and crops are stored as checksums.


@pytest.fixture(scope="module")
def golden_image():
    return draw_smear()


def checksums(masks):
    "One number per mask, as the golden file holds it."
    return [zlib.crc32(np.packbits(mask).tobytes()) for mask in masks]


@pytest.mark.parametrize("mode, limit", [("released", 0.71), ("fixed", 0.104)])
def test_everything_is_as_the_unmodified_code_has_it(golden_image, mode, limit):
    golden, shape = GOLDEN[mode], golden_image.shape[:2]
    segmenter = ReleasedSegmenter(dark, dict.fromkeys(SCALES, tinted(limit)), equalize=mode)
    nuclei = segmenter.nuclei(golden_image)
    whole = np.zeros(shape, bool)
    for nucleus in nuclei:
        whole |= mask_from_cell(nucleus, shape) > 0
    assert checksums([whole]) == [golden["nuclei"]]
    stained = released_equalization(golden_image, mode)
    assert [zlib.crc32(np.ascontiguousarray(stained[..., c])) for c in range(3)] == golden["equalised"]
    kept = []
    for scale in SCALES:
        expected = golden["scales"][str(scale)]
        assert RELEASED_LIMITS[scale] == tuple(expected["limits"])
        regions = segmenter.regions(stained, nuclei, scale)
        answers = segmenter.predict_regions(regions)
        cells = [released_cell(region, answer) for region, answer in zip(regions, answers)]
        contents = [nonzero_box(region.crop) for region in regions]
        assert [list(region.box) for region in regions] == expected["bbox"]
        assert [list(region.canvas) for region in regions] == expected["canvas"]
        assert [list(region.shift) for region in regions] == expected["shift"]
        assert [zlib.crc32(region.crop.tobytes()) for region in regions] == expected["netin"]
        assert [[top, bottom, left, right] for top, left, bottom, right in contents] == expected["net_bbox"]
        inside = [
            released_mask(answer)[top:bottom, left:right]
            for answer, (top, left, bottom, right) in zip(answers, contents)
        ]
        assert checksums(inside) == expected["net_mask"]
        windows = [np.s_[top:bottom, left:right] for top, left, bottom, right in expected["bbox"]]
        drawn = [mask_from_cell(cell, shape) for cell in cells]
        assert (
            checksums(mask_from_cell(nucleus, shape)[here] > 0 for nucleus, here in zip(nuclei, windows))
            == expected["nucleus"]
        )
        for value in (40, 20):
            assert checksums(mask[here] == value for mask, here in zip(drawn, windows)) == expected[f"mask{value}"]
        assert [np.count_nonzero(mask) for mask in drawn] == [sum(areas) for areas in expected["pixels_40_20"]]
        assert [[np.count_nonzero(cell.nucleus), np.count_nonzero(cell.cytoplasm)] for cell in cells] == expected[
            "pixels_40_20"
        ]
        assert [cell.ratio for cell in cells] == expected["ratio"]
        assert [plausible(cell) for cell in cells] == expected["kept"]
        kept += [(cell.id, cell.scale) for cell in cells if plausible(cell)]
    cells = segmenter.segment(golden_image)
    assert [(cell.id, cell.scale) for cell in cells] == kept
    if mode == "released":
        (line,) = submission_lines({"100": cells}, {"100": shape})
        name, *instances = line.split("\t")
        assert name == GOLDEN["submission"]["name"] and len(instances) == 24
        assert (
            sorted(hashlib.sha256(text.encode()).hexdigest() for text in instances) == GOLDEN["submission"]["instances"]
        )


# -- each quirk by itself ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 0.9), st.integers(1, 12))
def test_masks_are_cleaned_as_by_scipy(seed, share, least):
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).random((24, 31)), 0.8, mode="constant", cval=0.5)
    mask = mask > np.quantile(mask, share)
    filled = ndimage.binary_fill_holes(mask, structure=SQUARE)
    assert np.array_equal(fill_tight_holes(mask), filled)
    opened = ndimage.binary_dilation(ndimage.binary_erosion(mask, SQUARE), SQUARE)
    labels, _ = ndimage.label(ndimage.binary_fill_holes(opened, structure=SQUARE), SQUARE)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    assert np.array_equal(clean_mask(mask, least), areas[labels] >= least)


def test_nuclei_are_stretched_masks_in_raster_order():
    probability = np.zeros((800, 800), np.float32)
    for row, column, radius in ((400, 100, 30), (380, 600, 25), (100, 300, 20), (700, 700, 5), (600, 300, 6)):
        probability[disc((800, 800), row, column, radius)] = 0.51
    nuclei = released_nuclei(probability, (768, 1020))
    assert [nucleus.id for nucleus in nuclei] == [1, 2, 3, 4]  # 69 pixels are too few, 109 are not
    centres = [
        np.add(np.argwhere(nucleus.nucleus).mean(0), nucleus.bbox[:2]) * (800 / 768, 800 / 1020) for nucleus in nuclei
    ]
    assert np.allclose(centres, [(100, 300), (380, 600), (400, 100), (600, 300)], atol=1)
    tops = [(nucleus.bbox[0], nucleus.bbox[1] + nucleus.nucleus[0].argmax()) for nucleus in nuclei]
    assert tops == sorted(tops)
    assert not released_nuclei(np.full((800, 800), 0.5, np.float32), (60, 80))  # only above one half


def test_nuclei_that_touch_at_a_corner_are_one():
    probability = np.zeros((800, 800), np.float32)
    probability[100:110, 100:110] = probability[110:120, 110:120] = 0.9
    assert len(released_nuclei(probability, (800, 800))) == 1


@pytest.mark.parametrize("index", (0, 1, 2))
def test_equalisation_writes_into_the_channel_of_the_picture(index):
    image = picture((20, 30)) // np.array([2, 3, 4], np.uint8)
    fixed, bug = released_equalization(image, "fixed"), released_equalization(image, "released", index)
    others = [c for c in range(3) if c != index]
    assert np.array_equal(bug[..., others], image[..., others])
    if index < 2:
        assert np.array_equal(bug[..., index], fixed[..., 2])
    else:  # the blue channel has become the equalised green one by the time it is read
        assert np.array_equal(bug[..., 2], released_equalization(np.repeat(fixed[..., 1:2], 3, 2), "fixed")[..., 0])
    assert released_equalization(image, None) is image


def test_margins_round_half_to_even_and_border_crops_are_centred():
    image = picture((120, 160))
    nucleus = nucleus_at((120, 160), 4, 80, 10)  # 14 rows are inside
    region = released_region(image, nucleus, 0.5)
    height, width = nucleus.shape
    assert (height, width) == (14, 19)
    assert region.canvas == (14 + 2 * 4, 19 + 2 * 5)  # 3.5 goes to 4, 4.75 to 5
    assert released_region(image, nucleus_at((120, 160), 60, 80, 5.1), 0.5).canvas[0] == 11 + 2 * 3  # 2.75 to 3
    assert released_region(image, nucleus_at((120, 160), 60, 80, 5), 0.5).canvas[0] == 9 + 2 * 2  # 2.25 to 2
    assert region.box == (0, 80 - 9 - 5, 18, 80 + 10 + 5) and region.shift == (2, 0)  # 4 rows are missing
    assert released_region(image, nucleus_at((120, 160), 9, 80, 5.1), 2.0).shift[0] == round((33 - 26) / 2) == 4


def test_small_crops_are_padded_and_others_squeezed():
    small = np.dstack([picture((21, 30)), np.full((21, 30), 255, np.uint8)])
    padded = fit_region(small, 64)
    assert nonzero_box(padded) == (21, 17, 42, 47) and np.array_equal(padded[21:42, 17:47], small)
    for shape in ((64, 20), (20, 64), (64, 64), (200, 90)):
        assert nonzero_box(fit_region(np.full((*shape, 4), 9, np.uint8), 64)) == (0, 0, 64, 64)
    assert nonzero_box(np.zeros((5, 6, 4), np.uint8)) == (0, 0, 5, 6)


def test_the_fourth_channel_is_this_nucleus_alone():
    nucleus = nucleus_at((120, 160), 60, 80, 20)
    region = released_region(picture((120, 160)), nucleus, 1.75, 64)
    assert set(np.unique(region.crop[..., 3])) == {0, 255} and region.crop.shape == (64, 64, 4)
    assert np.count_nonzero(region.crop[..., 3]) / 64**2 == pytest.approx(
        nucleus.area / np.prod(region.canvas), rel=0.05
    )


def test_the_biggest_piece_is_taken_before_the_nucleus_joins():
    nucleus = nucleus_at((400, 500), 200, 250, 80)
    region = released_region(picture((400, 500)), nucleus, 0.5)
    answer = np.zeros((256, 256), np.float32)
    answer[2:40, 2:40] = 0.485  # 1444 px, far from the nucleus
    answer[120:130, 120:130] = 0.9
    answer[60:160, 250:] = 0.479
    mask = released_mask(answer)
    assert mask.sum() == 38 * 38 and mask[2:40, 2:40].all()
    cell = released_cell(region, answer)
    assert ndimage.label(cell.mask)[1] == 2 and cell.score == pytest.approx(0.485)
    assert np.count_nonzero(cell.nucleus) == nucleus.area - 1
    answer[39:60, 39:60] = 0.6  # shares one pixel with the first: one piece
    answer[39, 39] = 0
    assert released_mask(answer).sum() == 38 * 38 - 1  # a corner is no 4-connection


def test_first_pixel_of_the_nucleus_becomes_cytoplasm():
    nucleus = nucleus_at((120, 160), 60, 80, 20)
    cell = released_cell(released_region(picture((120, 160)), nucleus, 1.75), np.zeros((256, 256), np.float32))
    assert np.count_nonzero(cell.cytoplasm) == 1 and cell.area == nucleus.area
    row, column = np.argwhere(cell.cytoplasm)[0] + cell.bbox[:2]
    assert (row, column) == tuple(np.argwhere(nucleus.nucleus)[0] + nucleus.bbox[:2])
    one = Cell(1, (5, 5, 6, 6), np.ones((1, 1), bool), np.zeros((1, 1), bool))
    lonely = released_cell(released_region(picture((12, 16)), one, 3.0), np.zeros((256, 256), np.float32))
    assert lonely.ratio == np.inf and not plausible(lonely)


def test_black_lines_at_the_rim_lose_the_cell():
    image = picture((200, 200))
    nucleus = nucleus_at((200, 200), 100, 100, 20)
    box = released_region(image, nucleus, 1.75).box
    inside, rim = image.copy(), image.copy()
    inside[box[0] + 1], rim[box[0]] = 0, 0
    assert released_cell(released_region(inside, nucleus, 1.75), np.ones((256, 256), np.float32)) is not None
    assert released_cell(released_region(rim, nucleus, 1.75), np.ones((256, 256), np.float32)) is None


@pytest.mark.parametrize("scale, low, high", [(0.5, 0, 0.8), (1.75, 0.4, 200), (2.6, 0.3, 200), (3.0, 0.4, 200)])
def test_limits_include_their_ends(scale, low, high):
    def cell(ratio):
        row = np.zeros((1, 1000), bool)
        nucleus, cytoplasm = row.copy(), row.copy()
        nucleus[:, : 500 if ratio <= 1 else 4], cytoplasm[:, 500 : 500 + round(ratio * 500)] = True, True
        return Cell(1, (0, 0, 1, 1000), nucleus, cytoplasm, scale)

    assert plausible(cell(low)) and not (low and plausible(cell(low - 0.002)))
    if high < 1:
        assert plausible(cell(high)) and not plausible(cell(high + 0.002))


def test_all_scales_see_256_unless_told_otherwise():
    image, seen = picture((120, 160)), {}

    def watching(scale):
        def network(crops):
            assert 0 <= crops.min() and crops.max() <= 1 and set(crops[:, 3].unique().tolist()) <= {0, 1}
            seen[scale] = crops.shape[-1]
            return crops[:, :1] - 2

        return network

    def one_nucleus(images):
        return above(torch.from_numpy(disc((800, 800), 400, 400, 50))[None, None])

    for size, sizes in ((256, [256] * 4), (384, [256, 384, 384, 384])):
        cells = ReleasedSegmenter(one_nucleus, {scale: watching(scale) for scale in SCALES}, large_size=size).segment(
            image
        )
        assert list(seen.values()) == sizes
        assert [cell.scale for cell in cells] == [0.5]  # a nucleus alone is too little for the others
