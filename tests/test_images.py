"""Picture files: what is written comes back, what is broken is named, and nothing is lost on the way."""

import errno
import io
import os
import pickle
import struct
import zlib
from unittest import mock

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segpc_nb.files import MAX_PIXELS, PictureError, write_bytes
from segpc_nb.images import (
    PICTURE_SUFFIXES,
    equalize_histogram,
    natural_key,
    read_mask,
    read_picture,
    write_image,
)
from segpc_nb.inputs import name_pictures, picture_files
from segpc_nb.mask_png import window_png

fast = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def smooth(seed=0, shape=(60, 80)):
    "A picture that JPEG keeps."
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 4)


def encoded(image, form, **options):
    handle = io.BytesIO()
    image.save(handle, form, **options)
    return handle.getvalue()


# ---- writing and reading


@fast
@given(seeds, sizes, st.sampled_from([".bmp", ".png", ".PNG", ".Bmp"]), st.booleans())
def test_lossless_round_trip(tmp_path_factory, seed, size, suffix, mask):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("trip") / f"a{suffix}"
    if mask:
        image = rng.choice(np.array([0, 20, 40], np.uint8), size)
        write_image(path, image)
        assert np.array_equal(read_mask(path), image)
    else:
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        write_image(path, image)
        assert np.array_equal(read_picture(path), image)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("form", "suffix", "tolerance"),
    [("BMP", ".bmp", 0), ("PNG", ".png", 0), ("TIFF", ".tif", 0), ("TIFF", ".TIFF", 0), ("JPEG", ".jpg", 3)],
)
def test_channels_are_in_the_order_of_another_reader(tmp_path, form, suffix, tolerance):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(Image.fromarray(smooth()), form))
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    found = read_picture(path)
    assert found.flags.c_contiguous
    assert abs(found - expected).max() <= tolerance


def test_opaque_alpha_and_palettes_are_resolved(tmp_path):
    image = Image.fromarray(smooth())
    (tmp_path / "alpha.png").write_bytes(encoded(image.convert("RGBA"), "PNG"))
    assert np.array_equal(read_picture(tmp_path / "alpha.png"), smooth())
    palette = image.quantize(64)
    (tmp_path / "palette.png").write_bytes(encoded(palette, "PNG"))
    assert np.array_equal(read_picture(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))


def test_orientation_tags_do_not_turn_the_picture(tmp_path):
    image, exif = Image.fromarray(smooth()), Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(encoded(image, "JPEG", exif=exif))
    assert read_picture(tmp_path / "turned.jpg").shape == (60, 80, 3)


def test_written_sixteen_bits_survive(tmp_path):
    labels = np.array([[0, 300], [65535, 7]], np.uint16)
    write_image(tmp_path / "labels.png", labels)
    assert np.array_equal(cv2.imread(str(tmp_path / "labels.png"), cv2.IMREAD_UNCHANGED), labels)


@fast
@given(seeds, st.integers(1, 200), st.integers(1, 40), st.data())
def test_a_window_png_is_a_sound_file_for_other_readers(seed, height, width, data):
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    frame = np.zeros((height, width), np.uint8)
    frame[top:bottom, left:right] = np.random.default_rng(seed).integers(0, 256, (bottom - top, right - left))
    file = window_png(frame[top:bottom, left:right], (top, left, bottom, right), frame.shape)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), frame)  # Pillow checks the sums of the chunks
    (length,) = struct.unpack(">I", file[33:37])
    rows = zlib.decompress(file[41 : 41 + length])  # zlib checks the sum of the stream
    assert np.array_equal(np.frombuffer(rows, np.uint8).reshape(height, width + 1)[:, 1:], frame)


# ---- faults of pictures


@pytest.mark.parametrize("suffix", [".bmp", ".png", ".jpg", ".tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_files(tmp_path, suffix, share):
    content = encoded(Image.fromarray(smooth()), {".bmp": "BMP", ".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF"}[suffix])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PictureError, match="no readable picture"):
        read_picture(path)


def wrong_modes():
    grey, image = Image.fromarray(smooth()[..., 0]), Image.fromarray(smooth())
    glass = image.convert("RGBA")
    glass.putpixel((3, 3), (1, 2, 3, 100))
    five = io.BytesIO()
    tifffile.imwrite(five, np.zeros((20, 30, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    yield "grey.png", encoded(grey, "PNG"), "one grey channel"
    yield "grey.bmp", encoded(grey, "BMP"), "one grey channel"
    yield "grey.jpg", encoded(grey, "JPEG"), "one grey channel"
    yield "one_bit.png", encoded(grey.convert("1"), "PNG"), "one grey channel"
    yield "glass.png", encoded(glass, "PNG"), "not opaque"
    yield "sixteen.png", cv2.imencode(".png", smooth().astype(np.uint16))[1].tobytes(), "uint16"
    yield "float.tif", encoded(grey.convert("F"), "TIFF"), "float32"
    yield "five.tif", five.getvalue(), "no readable picture|5 channels"
    yield "empty.png", b"", "empty file"
    yield "text.png", b"no picture at all", "no readable picture"
    yield "zeros.bmp", bytes(5000), "no readable picture"
    yield "picture.gif", encoded(image, "GIF"), "suffix '.gif'"
    yield "picture", encoded(image, "PNG"), r"suffix '\(none\)'"


@pytest.mark.parametrize(("name", "content", "message"), [pytest.param(*case, id=case[0]) for case in wrong_modes()])
def test_wrong_pictures_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PictureError, match=message) as caught:
        read_picture(tmp_path / name)
    assert name in str(caught.value)
    assert caught.value.path == tmp_path / name


def test_a_suffix_that_lies_does_not_matter(tmp_path):
    (tmp_path / "a.bmp").write_bytes(encoded(Image.fromarray(smooth()), "PNG"))
    assert np.array_equal(read_picture(tmp_path / "a.bmp"), smooth())


def forged(form, side):
    "A small file whose header announces side x side pixels."
    content = bytearray(encoded(Image.fromarray(smooth()), form))
    if form == "BMP":
        content[18:26] = struct.pack("<ii", side, side)
    elif form == "PNG":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", side, side)
    return bytes(content)


@pytest.mark.parametrize(
    ("form", "side"),
    [
        ("BMP", 20_000),
        ("PNG", 20_000),
        ("JPEG", 20_000),
        ("JPEG", 65_000),
        ("PNG", 2**31 - 1),
        ("BMP", 2**31 - 1),
        ("PNG", 12_500),
    ],
)
def test_forged_sizes_are_refused_from_the_header(tmp_path, monkeypatch, form, side):
    path = tmp_path / f"huge.{form.lower()}"
    path.write_bytes(forged(form, side))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the pixels were touched"))
    with pytest.raises(PictureError, match=f"more than {MAX_PIXELS:,} pixels"):
        read_picture(path)


@settings(max_examples=120, deadline=None)
@given(seeds, st.sampled_from(["BMP", "PNG", "JPEG", "TIFF"]), st.integers(1, 12))
def test_damaged_bytes_give_a_picture_or_a_picture_error(tmp_path_factory, seed, form, n):
    rng = np.random.default_rng(seed)
    content = np.frombuffer(encoded(Image.fromarray(smooth(shape=(12, 16))), form), np.uint8).copy()
    where = np.where(rng.random(n) < 0.5, rng.integers(0, min(64, len(content)), n), rng.integers(0, len(content), n))
    content[where] = rng.integers(0, 256, n)
    path = tmp_path_factory.mktemp("fuzz") / f"a.{form.lower()}"
    path.write_bytes(content.tobytes())
    with mock.patch("segpc_nb.images.MAX_PIXELS", 100_000):  # a damaged size costs time only
        for read in (read_picture, read_mask):
            try:
                found = read(path)
            except PictureError as error:
                assert str(path) in str(error)
            else:
                assert found.dtype == np.uint8


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(PictureError, match="no such file; check the name"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PictureError, match="can't be read"):
        read_picture(tmp_path / "folder.png")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(PictureError("a.png", "empty file", "copy it again")))
    assert (str(error), error.fix) == ("a.png: empty file; copy it again", "copy it again")


# ---- masks


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("form", ["BMP", "PNG"])
def test_masks_of_one_three_and_four_channels(tmp_path, form, channels):
    mask = np.random.default_rng(0).choice(np.array([0, 20, 40], np.uint8), (9, 7))
    image = Image.fromarray(mask if channels == 1 else np.dstack([mask] * channels))
    (tmp_path / f"1_1.{form.lower()}").write_bytes(encoded(image, form))
    assert np.array_equal(read_mask(tmp_path / f"1_1.{form.lower()}"), mask)


@pytest.mark.parametrize(
    ("values", "found"), [([0, 60], "0 60"), ([0, 255], "0 255"), ([0, 1, 2], "0 1 2"), ([0, 20, 40, 41], "0 20 40 41")]
)
def test_wrong_mask_values_are_listed(tmp_path, values, found):
    write_image(tmp_path / "1_1.png", np.resize(np.array(values, np.uint8), (4, 6)))
    with pytest.raises(
        PictureError, match=f"uint8 with values {found}; allowed are uint8 0 .background., 20 .cytoplasm., 40 .nucleus."
    ):
        read_mask(tmp_path / "1_1.png")


def test_masks_of_other_types(tmp_path):
    mask = np.repeat(np.repeat(np.array([[0, 20], [40, 20]], np.uint8), 13, 0), 13, 1)
    (tmp_path / "1_1.jpg").write_bytes(encoded(Image.fromarray(mask), "JPEG", quality=60))
    with pytest.raises(PictureError, match="JPEG spoils masks"):
        read_mask(tmp_path / "1_1.jpg")
    write_image(tmp_path / "1_1.png", mask.astype(np.uint16))
    with pytest.raises(PictureError, match="uint16 with values 0 20 40"):
        read_mask(tmp_path / "1_1.png")


# ---- writing safely


@pytest.mark.parametrize(("image", "name", "message"), [
    (np.zeros((2, 2), np.uint16), "a.bmp", "values of type uint16"),
    (np.zeros((2, 2), np.int32), "a.png", "values of type int32"),
    (np.zeros((2, 2)), "a.png", "values of type float64"),
    (np.zeros((2, 2), bool), "a.png", "values of type bool"),
    (np.zeros((2, 2), np.uint8), "a.gif", "suffix '.gif'"),
    (np.zeros((2, 2), np.uint8), "a.tif", "suffix '.tif'"),
    (np.zeros((2, 2, 4), np.uint8), "a.png", r"shape \(2, 2, 4\)"),
    (np.zeros((0, 2), np.uint8), "a.png", r"shape \(0, 2\)"),
    (np.zeros(4, np.uint8), "a.png", r"shape \(4,\)"),
])  # fmt: skip
def test_what_would_be_spoiled_is_not_written(tmp_path, image, name, message):
    with pytest.raises(PictureError, match=message):
        write_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "fix"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose a folder"), (errno.EACCES, "choose a folder")],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, code, fix):
    path = tmp_path / "deep" / "a.png"
    write_image(path, np.full((2, 2), 20, np.uint8))

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=fix) as caught:
        write_image(path, np.full((2, 2), 40, np.uint8))
    assert caught.value.errno == code
    assert str(path) in str(caught.value)
    assert np.array_equal(read_mask(path), np.full((2, 2), 20))
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    monkeypatch.setattr("segpc_nb.files.secrets.token_hex", lambda n: "x")
    (tmp_path / ".x.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="free some space"):
        write_bytes(tmp_path / "a.bin", b"1" * 100_000)
    assert not list(tmp_path.iterdir())


# ---- finding


@given(st.lists(st.text("ab019_²٣é", max_size=6), max_size=8), st.randoms(use_true_random=False))
def test_natural_order_is_total_and_knows_numbers(names, random):
    shuffled = random.sample(names, len(names))
    assert sorted(shuffled, key=natural_key) == sorted(names, key=natural_key)
    assert sorted({f"p{n}.bmp" for n in (100, 9, 20, 1)}, key=natural_key) == [
        "p1.bmp",
        "p9.bmp",
        "p20.bmp",
        "p100.bmp",
    ]


def test_folders_and_files_each_once(tmp_path, monkeypatch):
    for name in ("10.BMP", "9.png", ".hidden.png", "._9.png", "9.txt", "a b (1).jpeg", "ü.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "1.png").touch()
    monkeypatch.chdir(tmp_path)
    names = ["9", "10", "a b (1)", "below/1", "ü"]
    assert list(name_pictures([tmp_path])) == names
    assert list(name_pictures(["ü.tiff", ".", tmp_path / "9.png", "below/../9.png"])) == ["ü", *names[:4]]
    assert picture_files(tmp_path / "none") == []
    assert all(path.suffix.lower() in PICTURE_SUFFIXES for path in picture_files(tmp_path))


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="paths is empty"):
        name_pictures([])
    with pytest.raises(PictureError, match="a folder without pictures"):
        name_pictures([tmp_path])
    with pytest.raises(PictureError, match="no such file or folder"):
        name_pictures([tmp_path / "none.png"])


# ---- equalisation


@fast
@given(seeds, sizes)
def test_equalisation_follows_the_cumulated_histogram_of_each_channel(seed, size):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 200, 3)
    image = rng.integers(low, low + rng.integers(1, 56, 3), (*size, 3)).astype(np.uint8)
    found = equalize_histogram(image)
    assert found.dtype == np.uint8
    for channel in range(3):
        values, counts = np.unique(image[..., channel], return_counts=True)
        expected = image[..., channel].astype(float)
        if len(values) > 1:  # a flat channel stays as it is
            table = dict(zip(values, 255 * (counts.cumsum() - counts[0]) / (counts.sum() - counts[0])))
            expected = np.vectorize(table.get)(image[..., channel])
        assert abs(found[..., channel] - expected).max() <= 0.51
