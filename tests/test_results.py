"""Files and back: masks, tables and submissions keep every cell, and bad files are named."""

import os
import zipfile
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from segpc_nb.cells import CYTOPLASM, NUCLEUS, Cell, cell_from_parts, mask_from_cell, resize_cell, same_cell
from segpc_nb.dataset import list_samples
from segpc_nb.metrics import OFFICIAL_SHAPE, evaluate_cells, official_score
from segpc_nb.results import (
    COLUMNS,
    cells_table,
    read_cells_csv,
    read_masks,
    read_results,
    write_cells_csv,
    write_masks,
)
from segpc_nb.submission import read_submission, write_submission

fast = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(fast, max_examples=8)
seeds = st.integers(0, 2**32 - 1)


def random_cells(rng, n, shape):
    "Speckled cells, overlapping, some with one part only, some with slack in their box."
    cells = []
    for k in range(n):
        height, width = rng.integers(2, 14, 2)
        top, left = rng.integers(0, shape[0] - height + 1), rng.integers(0, shape[1] - width + 1)
        nucleus, cytoplasm = rng.random((2, height, width)) < 0.5
        if rng.random() < 0.3:
            nucleus[:] = False
        if rng.random() < 0.3:
            cytoplasm[:] = False
        (nucleus if rng.random() < 0.5 else cytoplasm)[0, 0] = True
        cytoplasm &= ~nucleus
        box = (int(top), int(left), int(top + height), int(left + width))
        cells.append(
            Cell(k + 1, box, nucleus, cytoplasm, scale=float(rng.choice([0.5, 1.75])), score=float(rng.random()))
        )
    return cells


def random_set(seed, shape=(30, 44)):
    rng = np.random.default_rng(seed)
    cells = {id: random_cells(rng, rng.integers(0, 5), shape) for id in ("10", "9", "10_1", "x-ray é")}
    return cells, dict.fromkeys(cells, shape)


# masks


@fast
@given(seed=seeds, suffix=st.sampled_from([".png", ".bmp"]))
def test_masks_come_back(seed, suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    cells, shapes = random_set(seed)
    for id, members in cells.items():
        write_masks(folder, id, members, shapes[id], suffix)
    back = read_masks(folder)
    assert set(back) == {id for id in cells if cells[id]}
    for id, members in back.items():
        assert [cell.id for cell in members] == list(range(1, len(members) + 1))
        assert all(same_cell(a, b) for a, b in zip(members, cells[id], strict=True))


def test_mask_files_are_the_official_encoding(tmp_path):
    cell = random_cells(np.random.default_rng(1), 1, (30, 44))[0]
    path = write_masks(tmp_path, "7", [cell], (30, 44), ".bmp")[0]
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert path.name == "7_1.bmp" and pixels.shape == (30, 44) and pixels.dtype == np.uint8
    assert set(np.unique(pixels)) <= {0, CYTOPLASM, NUCLEUS} and np.array_equal(pixels, mask_from_cell(cell, (30, 44)))


def test_masks_of_an_earlier_run_go_and_others_stay(tmp_path):
    rng = np.random.default_rng(0)
    for id in ("10", "10_1", "1"):
        write_masks(tmp_path, id, random_cells(rng, 12, (30, 44)), (30, 44), ".bmp")
    write_masks(tmp_path, "10", random_cells(rng, 2, (30, 44)), (30, 44))
    assert {id: len(cells) for id, cells in read_masks(tmp_path).items()} == {"1": 12, "10": 2, "10_1": 12}
    write_masks(tmp_path, "1", [], (30, 44))
    assert "1" not in read_masks(tmp_path)


def test_masks_with_gaps_and_three_channels(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = NUCLEUS
    for name in ("9734_10.png", "9734_3.bmp"):
        cv2.imwrite(str(tmp_path / name), np.dstack([mask] * 3))
    assert [cell.id for cell in read_masks(tmp_path)["9734"]] == [3, 10]


def test_faulty_masks_are_named(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = NUCLEUS

    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, pixels in files.items():
            cv2.imwrite(str(tmp_path / name / f"{file}.png"), pixels)
        return tmp_path / name

    for case, files, message in (
        ("empty", {"5_1": np.zeros_like(mask)}, "5_1.png.*empty"),
        ("joined", {"5_1": np.where(mask > 0, 60, 0).astype(np.uint8)}, "5_1.png.*60"),
        ("sizes", {"5_1": mask, "5_2": mask[:6]}, "5_2.png.*size"),
        ("name", {"five": mask}, "five.png.*ID_K"),
        ("twice", {"5_1": mask, "5_01": mask}, "second mask number 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_masks(folder(case, **files))
    nothing = np.zeros((2, 2), bool)
    with pytest.raises(ValueError, match="no pixel"):
        write_masks(tmp_path / "new", "5", [Cell(1, (0, 0, 2, 2), nothing, nothing)], (8, 8))


# the table


@fast
@given(seed=seeds)
def test_table_comes_back_and_measures_full_frames(seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "cells.csv"
    cells, shapes = random_set(seed)
    write_cells_csv(path, cells, shapes)
    table = read_cells_csv(path)
    if not any(cells.values()):
        return
    pd.testing.assert_frame_equal(table, cells_table(cells, shapes))
    assert tuple(table.columns) == COLUMNS
    for row in table.itertuples():
        mask = mask_from_cell(cells[row.picture][row.id - 1], shapes[row.picture])
        rows, columns = np.nonzero(mask)
        assert (row.cell_area, row.nucleus_area, row.cytoplasm_area) == (
            len(rows),
            (mask == NUCLEUS).sum(),
            (mask == CYTOPLASM).sum(),
        )
        assert (row.row, row.column) == pytest.approx((rows.mean(), columns.mean()))
        assert (row.top, row.left, row.bottom, row.right) == (
            rows.min(),
            columns.min(),
            rows.max() + 1,
            columns.max() + 1,
        )
        assert row.touches_border == (mask[[0, -1]].any() or mask[:, [0, -1]].any())


def test_names_stay_text(tmp_path):
    cells = {id: random_cells(np.random.default_rng(0), 1, (30, 44)) for id in ("007", "NA", "1e5")}
    write_cells_csv(tmp_path / "cells.csv", cells, dict.fromkeys(cells, (30, 44)))
    assert read_cells_csv(tmp_path / "cells.csv").picture.tolist() == ["007", "NA", "1e5"]


@pytest.mark.parametrize(
    "text", ["", "a,b\n1\n1,2,3\n", "picture,id,score\n1,1,\n", "picture,id,score\n1,one,0.5\n", "\xff\x00"]
)
def test_faulty_tables_are_named(tmp_path, text):
    (tmp_path / "cells.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cells.csv"):
        read_cells_csv(tmp_path / "cells.csv")


@few
@given(seed=seeds)
def test_results_on_disk_score_as_in_memory(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    cells, shapes = random_set(seed)
    cells = {
        id: [cell_from_parts(c.id, c.bbox, c.nucleus, c.cytoplasm, None, c.scale, c.score) for c in members]
        for id, members in cells.items()
    }
    truth = {id: members[1:] + random_cells(np.random.default_rng(seed), 1, (30, 44)) for id, members in cells.items()}
    for id, members in cells.items():
        write_masks(folder / "y", id, members, shapes[id])
    write_cells_csv(folder / "cells.csv", cells, shapes)
    back, sizes = read_results(folder)
    assert all(shapes[id] == shape for id, shape in sizes.items())
    assert [cell.score for members in back.values() for cell in members] == [
        cell.score for id in back for cell in cells[id]
    ]
    a, b = (evaluate_cells(truth, pred, shapes, n_boot=0) for pred in (back, cells))
    for name in a.keys() - {"ci"}:
        assert a[name] == pytest.approx(b[name], abs=1e-12), name


# the submission


def organisers_parse(text):
    "Union of both lists of each instance; an empty list is a fault, as for the organisers' parser."
    pictures = {}
    for line in text.split("\n"):
        id, *instances = line.split("\t")
        for instance in instances:
            mask = np.zeros(OFFICIAL_SHAPE, bool)
            for part in instance.split(" "):
                for pair in part.split(";"):
                    row, column = pair.split(",")
                    mask[int(row), int(column)] = True
            pictures.setdefault(id, []).append(mask)
    return pictures


@few
@given(seed=seeds)
def test_submission_is_what_the_organisers_parse(seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("submission") / "submission.txt"
    cells, shapes = random_set(seed, (200, 300))
    cells = {id.replace(" ", ""): members[:2] for id, members in cells.items()}
    shapes = dict.fromkeys(cells, (200, 300))
    write_submission(path, cells, shapes)
    parsed = organisers_parse(path.read_text(encoding="utf-8")) if path.read_text(encoding="utf-8") else {}
    assert set(parsed) == {id for id in cells if cells[id]}
    for id, masks in parsed.items():
        for mask, cell in zip(masks, cells[id], strict=True):
            full = cv2.resize(mask_from_cell(cell, shapes[id]), OFFICIAL_SHAPE[::-1], interpolation=cv2.INTER_NEAREST)
            assert np.array_equal(mask, full > 0)


@few
@given(seed=seeds, suffix=st.sampled_from([".txt", ".zip"]))
def test_submission_comes_back_with_the_same_score(seed, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("submission") / f"submission{suffix}"
    cells, _ = random_set(seed)
    cells = {id.replace(" ", ""): members for id, members in cells.items()}
    truth = {
        id: members[::-1] + random_cells(np.random.default_rng(seed), 2, (30, 44)) for id, members in cells.items()
    }
    shapes = dict.fromkeys(cells, (30, 44))
    write_submission(path, cells, shapes)
    back = read_submission(path)
    assert list(back) == [id for id in ("9", "10", "10_1", "x-rayé") if cells[id]]
    for id, members in back.items():
        for new, old in zip(members, cells[id], strict=True):
            old = resize_cell(old, (30, 44), OFFICIAL_SHAPE)
            assert np.array_equal(new.mask, old.mask) and new.bbox == old.bbox
            assert same_cell(new, old) or not old.nucleus.any()  # a dummy pixel of nucleus is all that may differ
    assert official_score(truth, back, shapes, dict.fromkeys(back, OFFICIAL_SHAPE)) == official_score(
        truth, cells, shapes
    )


def test_cells_that_vanish_on_the_grid_are_left_out(tmp_path):
    shape = (4 * 1080, 4 * 1440)
    one, none = np.ones((1, 1), bool), np.zeros((1, 1), bool)
    cells = {
        "a": [Cell(1, (1, 1, 2, 2), one, none), Cell(2, (4, 4, 5, 5), one, none)],
        "b": [Cell(1, (1, 1, 2, 2), one, none)],
        "c": [],
    }
    write_submission(tmp_path / "s.txt", cells, dict.fromkeys("abc", shape))
    assert (tmp_path / "s.txt").read_text() == "a\t1,1 1,1"


def test_same_cells_same_zip_and_nothing_else_is_left(tmp_path):
    cells, shapes = {"a": random_cells(np.random.default_rng(0), 3, (30, 44))}, {"a": (30, 44)}
    for name in ("one.zip", "two.zip"):
        write_submission(tmp_path / name, cells, shapes)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "one.zip").namelist() == ["submission.txt"]
    before = (tmp_path / "one.zip").read_bytes()
    with pytest.raises(ValueError, match="white space"):
        write_submission(tmp_path / "one.zip", cells | {"b c": []}, shapes)
    assert (tmp_path / "one.zip").read_bytes() == before  # a failed run keeps the old file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zip", "two.zip"]


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"s.zip was not written"):
        write_submission(tmp_path / "file" / "s.zip", {}, {})


@pytest.mark.parametrize(
    "line, message",
    [
        ("7\t1,2 ", "line 1, picture '7', cell 1: a list is empty"),
        ("7\t 1,2", "a list is empty"),
        ("7\t1,2", "1 lists"),
        ("7\t1,2 1,2 1,2", "3 lists"),
        ("7\t1,2,3 1,2", "row,column"),
        ("7\t1;2 1,2", "row,column"),
        ("7\t1,x 1,2", "invalid literal"),
        ("7\t1,2 1080,0", "allowed are 0 to"),
        ("7\t-1,2 1,0", "allowed are 0 to"),
        (f"7\t1,{10**30} 1,0", "cell 1"),
        ("7\t1,2 1,3\n7\t1,2 1,3", "line 2: a second line of picture '7'"),
    ],
)
def test_faulty_submissions_are_named(tmp_path, line, message):
    (tmp_path / "s.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_submission(tmp_path / "s.txt")


def test_other_writers_habits_are_read(tmp_path):
    (tmp_path / "s.txt").write_bytes(b"7\t1,2;1,3; 2,2;\t\r\n\r\n8\r\n")
    cells = read_submission(tmp_path / "s.txt")
    assert cells["8"] == [] and len(cells["7"]) == 1 and cells["7"][0].area == 3


@fast
@given(seed=seeds)
@example(seed=3001051716)  # an unknown method of compression
def test_damaged_submissions_raise_value_errors_only(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(seed)
    for name in ("s.zip", "s.txt"):
        write_submission(folder / name, {"a": random_cells(rng, 2, (30, 44))}, {"a": (200, 300)})
        content = bytearray((folder / name).read_bytes())
        for place in rng.integers(0, len(content), 4):
            content[place] = rng.integers(0, 256)
        (folder / name).write_bytes(content[: rng.integers(0, len(content))] if rng.random() < 0.5 else content)
        try:
            read_submission(folder / name)
        except ValueError as error:
            assert name in str(error)


def test_zip_without_or_with_several_texts(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("a.txt", "")
        archive.writestr("b.txt", "")
    with pytest.raises(ValueError, match="2 text files"):
        read_submission(tmp_path / "s.zip")
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"7\t" * 10**8)
    with pytest.raises(ValueError, match=r"s\.zip: 200,000,000 bytes, packed into .*; at most 200 times"):
        read_submission(tmp_path / "s.zip")


def test_large_cells_come_back(tmp_path):
    disc = np.hypot(*np.mgrid[-100:101, -100:101])
    cell = cell_from_parts(1, (400, 400, 601, 601), disc < 60, disc < 100)
    cells = {str(i): [replace(cell, id=k) for k in range(5)] for i in range(4)}  # 20 cells of 31 000 px
    write_submission(tmp_path / "s.zip", cells, dict.fromkeys(cells, OFFICIAL_SHAPE))
    back = read_submission(tmp_path / "s.zip")
    assert list(back) == list(cells)
    for members in back.values():
        assert len(members) == 5 and all(np.array_equal(member.cytoplasm, cell.cytoplasm) for member in members)
        assert all((member.bbox, member.area) == (cell.bbox, cell.area) for member in members)


@pytest.mark.skipif("SEGPC_DATA" not in os.environ, reason="needs SEGPC_DATA")
def test_real_cells_come_back(tmp_path):
    samples = list_samples()[:6]
    cells = {sample.id: sample.cells() for sample in samples}
    shapes = {sample.id: sample.image().shape[:2] for sample in samples}
    for id, members in cells.items():
        write_masks(tmp_path / "y", id, members, shapes[id])
    back, sizes = read_results(tmp_path)
    assert sizes == shapes and all(same_cell(a, b) for id in cells for a, b in zip(cells[id], back[id], strict=True))
    write_submission(tmp_path / "s.zip", cells, shapes)
    nuclei = {
        id: [replace(cell, cytoplasm=np.zeros_like(cell.nucleus)) for cell in members] for id, members in cells.items()
    }
    grids = dict.fromkeys(cells, OFFICIAL_SHAPE)
    assert official_score(nuclei, read_submission(tmp_path / "s.zip"), shapes, grids) == official_score(
        nuclei, cells, shapes
    )
    assert official_score(cells, read_submission(tmp_path / "s.zip"), shapes, grids) == 1
