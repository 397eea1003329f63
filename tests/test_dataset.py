"""The data set on disk: every layout and every defect that copies of it have shown, and splits that never leak."""

import os
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from segpc_nb.archives import unpack_dataset
from segpc_nb.cells import CYTOPLASM, NUCLEUS, mask_from_cell
from segpc_nb.dataset import (
    SHARED_FIELDS,
    Sample,
    check_samples,
    find_dataset,
    find_split,
    fold_samples,
    instance_number,
    list_samples,
    overlap_groups,
    split_holdout,
)
from segpc_nb.grids import resize_image
from segpc_nb.images import PictureError, equalize_histogram, write_image
from segpc_nb.training_data import NucleusPictures

SHAPE = (24, 32)


def draw(y, x, radius=5):
    "A mask with one round cell."
    distance = np.hypot(np.arange(SHAPE[0])[:, None] - y, np.arange(SHAPE[1]) - x)
    return (np.uint8(CYTOPLASM) * (distance < radius) + np.uint8(NUCLEUS - CYTOPLASM) * (distance < radius / 2)).astype(
        np.uint8
    )


def write_split(folder, ids=("106", "2081"), suffix=".bmp", masks=True):
    "x and y of one split: cells 1 and 3 in every picture, the latter in three channels."
    for i, id in enumerate(ids):
        write_image(
            folder / "x" / f"{id}{suffix}", np.random.default_rng(i).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
        )
        if masks:
            write_image(folder / "y" / f"{id}_1.bmp", draw(8, 9 + i))
            write_image(folder / "y" / f"{id}_3.bmp", np.repeat(draw(14, 20)[..., None], 3, 2))
    return folder


def zipped(folder, path):
    "A zip with everything below a folder."
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as files:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                files.write(file, file.relative_to(folder))
    return path


# ---- layouts


def kaggle(folder):
    top = folder / "content" / "TCIA_SegPC_dataset" / "TCIA_SegPC_dataset" / "TCIA_SegPC_dataset"
    for split, ids in (("train", ("106", "2081")), ("validation", ("610", "1948")), ("test", ("5",))):
        write_split(top / split / split / split, ids, masks=split != "test")
    return zipped(folder / "content", folder / "archive.zip")


def dataport(folder, inner_prefix=True, valid="validation"):
    for split, ids in (("train", ("106", "2081")), (valid, ("610", "1948")), ("test", ("5",))):
        parts = folder / f"parts_{split}"
        write_split(parts / split if inner_prefix else parts, ids, masks=split != "test")
        zipped(parts, folder / "content" / "TCIA_SegPC_dataset" / f"{split}.zip")
    (folder / "content" / "__MACOSX").mkdir()
    (folder / "content" / "__MACOSX" / "._train.zip").write_bytes(b"resource fork")
    return zipped(folder / "content", folder / "archive.zip")


def plain(folder):
    for split, ids in (("train", ("106", "2081")), ("valid", ("610", "1948")), ("test", ("5",))):
        write_split(folder / "content" / "TCIA_SegPC_dataset" / split, ids, masks=split != "test")
    return zipped(folder / "content", folder / "archive.zip")


LAYOUTS = {
    "kaggle": kaggle,
    "dataport": dataport,
    "dataport without the split's folder": lambda folder: dataport(folder, inner_prefix=False),
    "dataport with valid": lambda folder: dataport(folder, valid="valid"),
    "plain with valid": plain,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_gives_the_same_samples(tmp_path, layout, monkeypatch):
    out = unpack_dataset(layout(tmp_path), tmp_path / "out with x in its name" / "x y")
    monkeypatch.setenv("SEGPC_DATA", str(out))
    for split, ids in (("train", ["106", "2081"]), ("validation", ["610", "1948"]), ("test", ["5"])):
        samples = list_samples(split=split)
        assert [sample.id for sample in samples] == ids
        assert [[cell.id for cell in sample.cells()] for sample in samples] == (
            [[1, 3]] * 2 if split != "test" else [[]]
        )
        assert samples[0].image().shape == (*SHAPE, 3)
        assert check_samples(samples).empty
    assert not list(out.rglob("*.zip"))
    with pytest.raises(PictureError, match="holds something already; give a new folder"):
        unpack_dataset(tmp_path / "archive.zip", out)


def test_three_channels_and_gaps_give_the_drawn_cells(tmp_path):
    write_split(tmp_path / "train")
    cells = list_samples(tmp_path)[0].cells()
    assert np.array_equal(mask_from_cell(cells[1], SHAPE), draw(14, 20))
    assert (cells[1].id, cells[1].scale, cells[1].score) == (3, 0.0, 1.0)


@pytest.mark.parametrize("suffix", [".bmp", ".PNG", ".jpg", ".jpeg"])
def test_any_suffix_and_odd_names(tmp_path, suffix):
    ids = ("9734", "10", "9", "a_b", "ü 1 (2)", "1.5")
    write_split(tmp_path / "train", ids, suffix)
    (tmp_path / "train" / "x" / ".hidden.png").touch()
    (tmp_path / "train" / "x" / "Thumbs.db").touch()
    samples = list_samples(tmp_path)
    assert [sample.id for sample in samples] == ["1.5", "9", "10", "9734", "a_b", "ü 1 (2)"]
    assert all([instance_number(path) for path in sample.masks] == [1, 3] for sample in samples)


def test_masks_are_ordered_by_number(tmp_path):
    write_image(tmp_path / "train" / "x" / "7.png", np.zeros((*SHAPE, 3), np.uint8))
    for k in (10, 2, 1, 33):
        write_image(tmp_path / "train" / "y" / f"7_{k}.png", draw(12, 5 + k % 20))
    assert [cell.id for cell in list_samples(tmp_path)[0].cells()] == [1, 2, 10, 33]


def test_the_root_may_be_the_split_itself_and_the_shallowest_wins(tmp_path, monkeypatch):
    write_split(tmp_path / "train")
    write_split(tmp_path / "copy" / "old" / "train", ("1", "2", "3"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()  # a file called x is no folder of pictures
    assert len(list_samples(tmp_path)) == len(list_samples(tmp_path / "train")) == 2
    monkeypatch.chdir(tmp_path / "train")
    assert len(list_samples(".")) == 2


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("SEGPC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set SEGPC_DATA"):
        find_dataset()
    with pytest.raises(FileNotFoundError, match=r"expected train/x/ID.bmp"):
        list_samples(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        list_samples(tmp_path / "none")
    (tmp_path / "train.zip").touch()
    with pytest.raises(FileNotFoundError, match="unpack the zips first"):
        list_samples(tmp_path)
    write_split(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="no split 'validation'; found: train"):
        list_samples(tmp_path, "validation")
    with pytest.raises(ValueError, match="allowed: train, validation, test"):
        find_split(tmp_path, "val")


# ---- zips that should not be trusted


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "train/../../out_too/escaped"])
def test_entries_that_point_outside_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as files:
        files.writestr("train/x/1.bmp", b"first")
        files.writestr(name, b"evil")
    with pytest.raises(PictureError, match="points out of the folder"):
        unpack_dataset(tmp_path / "evil.zip", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["evil.zip"]  # nothing at all was written
    assert not Path("/escaped").exists()


def test_an_escape_in_an_inner_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as files:
        files.writestr("../../escaped", b"evil")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as files:
        files.write(tmp_path / "train.zip", "train.zip")
    with pytest.raises(PictureError, match=r"train.zip: the entry '../../escaped'"):
        unpack_dataset(tmp_path / "archive.zip", tmp_path / "out")
    assert not list(tmp_path.rglob("escaped"))


def damaged_zip(path, kind):
    write_split(path.parent / "content" / "train")
    content = bytearray(zipped(path.parent / "content", path).read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[200] ^= 255
    elif kind == "encrypted":
        for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(sign) + offset] |= 1
    elif kind == "unknown compression":
        for sign, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            content[content.index(sign) + offset] = 77
    elif kind == "no zip":
        content = b"<html>please log in</html>"
    path.write_bytes(content)


WORDS = {
    "truncated": "no readable zip .*; download it again",
    "flipped": "no readable zip .*; download it again",
    "encrypted": "which needs a password; unpack it with another program",
    "unknown compression": "packed by method 77, which Python can't unpack; unpack it with another program",
    "no zip": "a web page; log in",
}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("inner", [False, True])
def test_damaged_zips_are_named(tmp_path, kind, inner):
    archive = tmp_path / "train.zip"
    damaged_zip(archive, kind)
    if inner:
        with zipfile.ZipFile(tmp_path / "archive.zip", "w") as files:
            files.write(archive, "train.zip")
    with pytest.raises(PictureError, match=rf"train.zip: .*{WORDS[kind]}"):
        unpack_dataset(tmp_path / "archive.zip" if inner else archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zips_in_zips_come_to_an_end(tmp_path):
    path = write_split(tmp_path / "train") / "x" / "106.bmp"
    for i in range(6):
        with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as files:
            files.write(path, path.name)
        path = tmp_path / f"{i}.zip"
    with pytest.raises(PictureError, match="nested too deep"):
        unpack_dataset(path, tmp_path / "out")
    with pytest.raises(PictureError, match="no such file; check the name"):
        unpack_dataset(tmp_path / "none.zip", tmp_path / "out")
    with pytest.raises(PictureError, match=r"can't be read .a folder."):
        unpack_dataset(tmp_path, tmp_path / "out")


# ---- defects


def test_check_lists_every_defect_and_stops_at_none(tmp_path):
    folder = write_split(tmp_path / "train", ("1", "2", "3", "4", "5", "6", "610"))
    x, y = folder / "x", folder / "y"
    (x / "2.bmp").write_bytes(b"")
    (x / "3.bmp").write_bytes((x / "1.bmp").read_bytes()[:100])
    write_image(x / "4.bmp", np.zeros((48, 64, 3), np.uint8))
    write_image(x / "5.bmp", np.zeros(SHAPE, np.uint8))
    (y / "610_1.bmp").unlink()
    (y / "610_3.bmp").unlink()
    write_image(y / "1_4.bmp", draw(8, 9) | draw(8, 12))  # two masks joined
    write_image(y / "1_5.bmp", np.zeros(SHAPE, np.uint8))
    (y / "1_6.bmp").write_bytes(b"no picture")
    write_image(y / "1_7.bmp", draw(8, 9))  # stored twice
    write_image(y / "1_8.bmp", np.where(draw(18, 25) == NUCLEUS, CYTOPLASM, draw(18, 25)).astype(np.uint8))
    write_image(y / "1_03.bmp", draw(18, 8))  # the number 3 is there
    write_image(y / "1_a.bmp", draw(8, 9))
    write_image(y / "77_1.bmp", draw(8, 9))
    write_image(y / "nonumber.bmp", draw(8, 9))
    (y / "6_2.gif").touch()
    (y / ".DS_Store").touch()
    found = check_samples(list_samples(tmp_path))
    expected = {
        "2.bmp": "empty file",
        "3.bmp": "no readable picture",
        "4_1.bmp": "a mask of 32x24 px; 64x48 px are needed",
        "4_3.bmp": "a mask of 32x24 px",
        "5.bmp": "one grey channel",
        "610.bmp": "no mask belongs to this picture",
        "1_4.bmp": "values 0 20 40 60",
        "1_5.bmp": "a mask without a cell",
        "1_6.bmp": "no readable picture",
        "1_7.bmp": "the same nucleus as in 1_1",
        "1_8.bmp": "a cell without a nucleus",
        "1_03.bmp": "a second cell of number 3",
        "1_a.bmp": "masks are named ID_K",
        "77_1.bmp": "no picture belongs to this mask",
        "nonumber.bmp": "no picture belongs to this mask",
        "6_2.gif": "not read; allowed are .bmp",
    }
    messages = dict(zip(found.file, found.problem))
    if "1_3.bmp" in messages:  # which of the two with number 3 comes second depends on the sorting of their names
        messages["1_03.bmp"] = messages.pop("1_3.bmp")
    assert set(messages) == set(expected)
    assert len(found) == len(expected)
    assert all(expected[name] in messages[name] for name in expected), messages


def sample_with(tmp_path, **masks):
    write_image(tmp_path / "7.png", np.zeros((*SHAPE, 3), np.uint8))
    for name, mask in masks.items():
        write_image(tmp_path / f"{name}.png", mask)
    return Sample("7", tmp_path / "7.png", tuple(tmp_path / f"{name}.png" for name in masks))


def test_cells_are_exact_or_an_error(tmp_path):
    with pytest.raises(PictureError, match=r"_7_04.png: a second cell of number 4"):
        sample_with(tmp_path, _7_4=draw(8, 9), _7_04=draw(8, 12)).cells()
    with pytest.raises(PictureError, match=r"_7_2.png: a mask of 31x24 px; 32x24 px are needed, as picture 7"):
        sample_with(tmp_path, _7_1=draw(8, 9), _7_2=draw(8, 9)[:, 1:]).cells()
    with pytest.raises(PictureError, match=r"_7_1.png: a mask without a cell"):
        sample_with(tmp_path, _7_1=draw(8, 9) * 0).cells()
    with pytest.raises(PictureError, match=r"60 means joined masks"):
        sample_with(tmp_path, _7_1=draw(8, 9) | draw(8, 12)).cells()
    twice = sample_with(tmp_path, _7_1=draw(8, 9), _7_2=draw(14, 20), _7_5=draw(8, 9))
    assert [cell.id for cell in twice.cells()] == [1, 2]
    assert Sample("7", tmp_path / "7.png").cells() == []


@pytest.mark.parametrize(
    "name", ["7.bmp", "7_.bmp", "_1.bmp", "7_a.bmp", "7_1b.bmp", "7_1 (1).bmp", "7_-1.bmp", "7_².bmp", "7_٣.bmp"]
)
def test_names_without_a_number(name):
    with pytest.raises(PictureError, match="masks are named ID_K"):
        instance_number(name)


def test_two_pictures_of_one_name(tmp_path):
    write_split(tmp_path / "train", ("106",), ".bmp")
    write_split(tmp_path / "train", ("106",), ".png")
    with pytest.raises(PictureError, match="a second picture called 106"):
        list_samples(tmp_path)


# ---- splits

shared_ids = sorted({id for pair in SHARED_FIELDS for id in pair})
sets_of_ids = st.lists(
    st.sampled_from(shared_ids) | st.integers(1, 9999).map(str), unique=True, min_size=1, max_size=60
)


def as_samples(ids):
    return [Sample(id, Path(f"{id}.bmp")) for id in ids]


def reachable(id, ids):
    "All pictures connected with one, by walking the pairs."
    seen = {id}
    while True:
        more = {b for pair in SHARED_FIELDS for a, b in (pair, pair[::-1]) if a in seen and b in ids} - seen
        if not more:
            return seen
        seen |= more


def ids_of(samples):
    return [sample.id for sample in samples]


@settings(max_examples=100, deadline=None)
@given(sets_of_ids, st.randoms(use_true_random=False))
def test_groups_are_the_connected_pictures(ids, random):
    groups = overlap_groups(as_samples(ids))
    assert sorted(id for group in groups for id in ids_of(group)) == sorted(ids)
    assert all(set(ids_of(group)) == reachable(group[0].id, ids) for group in groups)
    shuffled = random.sample(ids, len(ids))
    assert {frozenset(ids_of(group)) for group in overlap_groups(as_samples(shuffled))} == {
        frozenset(ids_of(group)) for group in groups
    }


@settings(max_examples=100, deadline=None)
@given(sets_of_ids, st.randoms(use_true_random=False))
def test_holdout_follows_the_rule(ids, random):
    kept, holdout = map(ids_of, split_holdout(as_samples(ids)))
    assert sorted(kept + holdout) == sorted(ids)
    assert set(holdout) == {id for id in ids if zlib.crc32(min(reachable(id, ids)).encode()) % 5 == 0}
    again = split_holdout(as_samples(random.sample(ids, len(ids))))
    assert set(ids_of(again[1])) == set(holdout)


@settings(max_examples=60, deadline=None)
@given(sets_of_ids, st.integers(1, 6), st.integers(0, 99))
def test_folds_are_even_and_keep_groups(ids, n_folds, seed):
    samples = as_samples(ids)
    groups = overlap_groups(samples)
    if n_folds > len(groups):
        with pytest.raises(ValueError, match=f"n_folds = {n_folds}, allowed: 1 to {len(groups)}"):
            fold_samples(samples, n_folds, seed)
        return
    folds = [ids_of(fold) for fold in fold_samples(samples, n_folds, seed)]
    assert sorted(id for fold in folds for id in fold) == sorted(ids)
    assert all(reachable(id, ids) <= set(fold) for fold in folds for id in fold)
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= max(map(len, groups))
    assert folds == [ids_of(fold) for fold in fold_samples(samples, n_folds, seed)]


def test_no_samples_no_trouble():
    assert overlap_groups([]) == []
    assert split_holdout([]) == ([], [])


def test_more_than_two_pictures_of_a_field():
    groups = [set(ids_of(group)) for group in overlap_groups(as_samples(shared_ids))]
    assert {"1991", "1993", "1994"} in groups
    assert {"2141", "2142", "2340"} in groups
    assert len(SHARED_FIELDS) == 18


# ---- pictures for stage one


def test_pictures_are_read_once(tmp_path):
    samples = list_samples(write_split(tmp_path / "train").parent)
    with mock.patch("segpc_nb.dataset.read_picture", side_effect=AssertionError) as reader:
        reader.side_effect = None
        reader.return_value = np.zeros((*SHAPE, 3), np.uint8)
        pictures = NucleusPictures(samples, (12, 16))
        for _ in range(3):
            assert len([pictures[i] for i in range(len(pictures))]) == 2
        assert reader.call_count == 2


@pytest.mark.parametrize("size", [(12, 16), SHAPE, (48, 64), (30, 20), (20, 40), (24, 16)])
def test_training_sees_what_prediction_sees(tmp_path, size):
    samples = list_samples(write_split(tmp_path / "train").parent)
    for sample, (image, target) in zip(samples, NucleusPictures(samples, size)):
        assert (image.shape, target.shape) == ((3, *size), (1, *size))
        assert image.dtype == target.dtype == torch.float32
        assert 0 <= image.min() and image.max() <= 1
        seen = resize_image(sample.image(), size)  # what the pipeline gives to the network
        assert np.array_equal((image * 255).round().numpy().astype(np.uint8), seen.transpose(2, 0, 1))
        nuclei = np.any([mask_from_cell(cell, SHAPE) == NUCLEUS for cell in sample.cells()], axis=0).astype(np.uint8)
        shrinks = size[0] <= SHAPE[0] and size[1] <= SHAPE[1]
        covered = cv2.resize(255 * nuclei, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        assert np.array_equal(target[0].numpy(), covered > 127)


def test_transform_moves_both_and_leaves_the_cache(tmp_path):
    samples = list_samples(write_split(tmp_path / "train").parent)
    plain, flipped = NucleusPictures(samples, SHAPE), NucleusPictures(samples, SHAPE, v2.RandomHorizontalFlip(1.0))
    for _ in range(2):
        for before, after in zip(plain[0], flipped[0]):
            assert torch.equal(before.flip(-1), after)
    image, _ = NucleusPictures(samples, SHAPE, equalize=True)[0]
    assert np.array_equal(
        (image * 255).round().numpy().astype(np.uint8), equalize_histogram(samples[0].image()).transpose(2, 0, 1)
    )


def test_batches_and_worker_processes(tmp_path):
    samples = list_samples(write_split(tmp_path / "train").parent)
    for workers in (0, 2):
        ((image, target),) = DataLoader(
            NucleusPictures(samples, (12, 16), v2.Identity()), batch_size=2, num_workers=workers
        )
        assert (image.shape, target.shape) == ((2, 3, 12, 16), (2, 1, 12, 16))
        assert type(image) is type(target) is torch.Tensor


def test_masks_of_another_size_than_the_picture_are_refused(tmp_path):
    samples = list_samples(write_split(tmp_path / "train").parent)
    write_image(samples[0].picture, np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(PictureError, match=r"106_1.bmp: a mask of 32x24 px; 64x48 px are needed"):
        NucleusPictures(samples, (12, 16))


# ---- the real thing


@pytest.mark.skipif(not os.environ.get("SEGPC_DATA"), reason="needs SEGPC_DATA")
def test_the_official_training_set():
    samples = list_samples()
    if len(samples) != 298:
        pytest.skip("SEGPC_DATA is not the official training set")
    assert sum(len(sample.masks) for sample in samples) == 1643
    assert [sample.id for sample in samples[:3]] == ["106", "108", "109"]
    kept, holdout = split_holdout(samples)
    assert (len(kept), len(holdout)) == (239, 59)
    assert [sorted(ids_of(group)) for group in overlap_groups(samples) if len(group) > 1] == [
        ["1934", "1939"],
        ["2111", "2112"],
        ["2128", "2148"],
        ["2141", "2340"],
        ["9431", "9432"],
    ]
    assert check_samples([sample for sample in samples if sample.id in ("106", "2044", "9734")]).problem.tolist() == [
        "the same nucleus as in 2044_3; take one of the two out"
    ]
