"""The data audit: planted defects are found, the kept numbers are those in the texts, and splits use what is found."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from segpc_nb.audit import audit_dataset, audit_summary, plant_defects
from segpc_nb.cli import main
from segpc_nb.dataset import SHARED_FIELDS, find_dataset, list_samples, split_samples
from segpc_nb.files import PictureError
from segpc_nb.overlaps import OVERLAPS, align, find_overlaps, overlap_box, read_overlaps, write_overlaps

root = Path(__file__).parent.parent
kept = json.loads((root / "results" / "studies" / "audit.json").read_text(encoding="utf-8"))
KNOWN = {("1934", "1939"), ("2128", "2148"), ("2111", "2112"), ("9431", "9432"), ("2141", "2340")}
TRAINED_ON = {  # digests of the ids of each part, as the package's networks were trained
    "train": "171572532d8c9786",
    "valid": "606686c480e58c52",
    "holdout": "547c0c43b8191038",
}


def field(seed, shape):
    "A smooth random field of lumps."
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=shape).astype(np.float32), (0, 0), 5)
    return np.repeat((190 + 800 * np.minimum(noise, 0.04)).clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def digest(names):
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]


def ids(split):
    return {name: [sample.id for sample in getattr(split, name)] for name in ("train", "valid", "holdout")}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant_defects(tmp_path_factory.mktemp("planted"))


# ---- overlaps


@pytest.mark.parametrize("move", [(0, 150), (170, 0), (90, -200), (-120, -100)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_planted_overlap_is_found_at_every_size(move, size):
    dy, dx = move
    big = field(1, (600, 800))
    windows = [big[t : t + 288, l : l + 384] for t, l in ((150, 200), (150 + dy, 200 + dx))]
    pictures = {"a": windows[0], "b": windows[1], "c": field(2, (288, 384)), "d": field(3, (288, 384))}
    large = {("train", id): cv2.resize(image, None, fx=size, fy=size) for id, image in pictures.items()}
    found = find_overlaps({key: (lambda image=image: image) for key, image in large.items()})
    assert found[["id", "other_id"]].to_numpy().tolist() == [["a", "b"]]
    assert abs(found.loc[0, "dx"] + size * dx) <= size and abs(found.loc[0, "dy"] + size * dy) <= size
    assert found.loc[0, "fraction"] == pytest.approx((288 - abs(dy)) * (384 - abs(dx)) / (288 * 384), abs=0.02)


def test_blank_pictures_and_scale_bars_are_no_overlap():
    pictures = {("train", str(k)): field(k, (288, 384)) for k in range(5)}
    for image in pictures.values():
        image[250:262, 300:370], image[252:260, 305:365] = 0, 255
    pictures["train", "blank"], pictures["train", "white"] = (np.full((288, 384, 3), v, np.uint8) for v in (0, 255))
    assert not len(find_overlaps({key: (lambda image=image: image) for key, image in pictures.items()}))
    assert not len(find_overlaps({}))


def test_copies_are_found_whatever_they_show():
    blank = np.zeros((30, 40, 3), np.uint8)
    found = find_overlaps({("train", str(k)): (lambda: blank) for k in range(3)})
    assert found[["id", "other_id", "fraction"]].to_numpy().tolist() == [["0", "1", 1.0], ["0", "2", 1.0]]


def test_align_agrees_with_every_translation_tried_by_numpy():
    big = field(4, (300, 400))[..., 0]
    a, b = big[:200, :300], big[60:260, 80:380]
    top, left, bottom, right = overlap_box(a.shape, b.shape, -80, -60)
    assert np.array_equal(a[top:bottom, left:right], b[: bottom - top, : right - left])
    scores = {}
    for dy in range(-63, -56):
        for dx in range(-83, -76):
            top, left, bottom, right = overlap_box(a.shape, b.shape, dx, dy)
            other = b[top + dy : bottom + dy, left + dx : right + dx]
            scores[dx, dy] = np.corrcoef(a[top:bottom, left:right].ravel(), other.ravel())[0, 1]
    assert align(a, b, -82, -58, 4)[:2] == max(scores, key=scores.get) == (-80, -60)


# ---- the file


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no readable table"),
        ("split,id,other_split\ntrain,1,\n", "no column other_id"),
        ("split,id,other_split,other_id\ntrain,,train,2\n", "missing in line 2"),
        ("split,id,other_split,other_id\ntrain,1,,\ntrain,2,train,\n", "missing in line 3"),
        ("split,id,other_split,other_id\ntrain,1,,\n", "1 pictures of train are not in it (2)"),
        ("split,id,other_split,other_id\nvalidation,1,,\ntrain,2,,\n", "1 pictures of train are not in it (1)"),
        ('split,id\n"train,1\n', "no readable table"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, said):
    (tmp_path / OVERLAPS).write_text(text)
    with pytest.raises(PictureError, match=f"{OVERLAPS}: .*{re.escape(said)}.*segpc check FOLDER --audit"):
        read_overlaps(tmp_path / OVERLAPS, "train", {"1", "2"})


def test_names_survive_the_file(tmp_path):
    names = ["NA", "007", "a,b", 'say "1"', "é"]
    rows = [("train", names[0], "train", names[1], 1, 2, 0.5, 0.9, 7)]
    columns = ["split", "id", "other_split", "other_id", "dx", "dy", "fraction", "correlation", "matches"]
    write_overlaps(tmp_path / OVERLAPS, [("train", name) for name in names], pd.DataFrame(rows, columns=columns))
    assert read_overlaps(tmp_path / OVERLAPS, "train", set(names)) == (("NA", "007"),)


# ---- splits


def numbered(folder, names):
    (folder / "train" / "x").mkdir(parents=True)
    for name in names:
        (folder / "train" / "x" / f"{name}.png").touch()
    return folder


def test_users_pictures_of_one_field_stay_together(tmp_path):
    folder, names = numbered(tmp_path, [f"p{k}" for k in range(60)]), [f"p{k}" for k in range(60)]
    assert split_samples(folder).overlaps is None
    pairs = [(names[k], names[k + 1]) for k in range(0, 60, 3)]
    rows = [("train", a, "train", b) for a, b in pairs] + [("train", name, "", "") for name in names]
    table = pd.DataFrame(rows, columns=["split", "id", "other_split", "other_id"])
    table.to_csv(folder / OVERLAPS, index=False)
    split = split_samples(folder)
    parts = ids(split)
    assert split.overlaps == tuple(pairs) and sorted(chain(*parts.values())) == sorted(names)
    assert all(sum(a in part or b in part for part in parts.values()) == 1 for a, b in pairs)
    assert all(len(part) >= 5 for part in parts.values())


def test_the_official_split_only_loses_to_training(tmp_path):
    "Networks were trained on it: a file takes pictures out of validation and hold-out, and puts none in."
    official = sorted({id for pair in SHARED_FIELDS for id in pair} | {str(k) for k in range(3000, 3080)})
    folder = numbered(tmp_path, official)
    before = ids(split_samples(folder))
    pair = before["train"][0], before["holdout"][0]
    rows = [("train", pair[0], "train", pair[1])] + [("train", name, "", "") for name in official]
    table = pd.DataFrame(rows, columns=["split", "id", "other_split", "other_id"])
    table.to_csv(folder / OVERLAPS, index=False)
    after = ids(split_samples(folder))
    assert set(after["train"]) > set(before["train"]) and pair[1] in after["train"]
    assert set(after["valid"]) <= set(before["valid"]) and set(after["holdout"]) < set(before["holdout"])
    assert sorted(chain(*after.values())) == sorted(official)


# ---- the audit


def test_a_bad_file_stops_nothing(planted, tmp_path):
    shutil.copytree(planted, tmp_path / "bad")
    (tmp_path / "bad" / "train" / "x" / "7.png").write_bytes(b"no picture")
    (tmp_path / "bad" / "train" / "y" / "7_1.png").write_bytes(b"")
    (tmp_path / "bad" / "train" / "y" / "1_x.png").write_bytes(b"")
    found = audit_dataset(tmp_path / "bad", n_boot=5)
    assert sorted(found.tables["other_problems"]["file"]) == ["1_x.png", "7.png", "7_1.png"]
    whole = audit_summary(audit_dataset(planted, n_boot=5))
    counts = audit_summary(found)["found"]
    assert {**counts, "other_problems": 0} == whole["found"] and whole["found"]["overlaps"] == 2


def test_the_command_writes_what_training_reads(planted, tmp_path, capsys):
    shutil.copytree(planted, tmp_path / "data")
    assert main(["check", str(tmp_path / "data"), "--audit"]) == 1  # an orphan and joined masks are errors
    assert "train 1 and train 2: 54%" in capsys.readouterr().out
    assert split_samples(tmp_path / "data").overlaps == (("1", "2"),)
    sheets = sorted(path.stem for path in (tmp_path / "data" / "audit").glob("*.png"))
    tables = sorted(path.stem for path in (tmp_path / "data" / "audit").glob("*.csv"))
    assert set(sheets) - {"overlaps"} <= set(tables) and len(sheets) == 9
    assert main(["check", str(tmp_path / "data"), "--audit", "--json", "--out", str(tmp_path / "out")]) == 1
    assert json.loads(capsys.readouterr().out)["audit"]["agreement"]["cells"] == 3
    assert (tmp_path / "out" / OVERLAPS).read_text() == (tmp_path / "data" / OVERLAPS).read_text()


def test_the_study_runs(planted, tmp_path):
    words = ["-p", "data", str(planted), "-p", "out", str(tmp_path), "-p", "n_boot", "5"]
    notebook = str(root / "nbs" / "studies" / "3_audit.ipynb")
    subprocess.run([sys.executable, "-m", "papermill", notebook, str(tmp_path / "out.ipynb"), *words], check=True)
    made = json.loads((tmp_path / "audit.json").read_text())
    assert set(made) == set(kept) and made["agreement"]["without_partner"] == 1


# ---- what the texts say


def markdown(name):
    cells = json.loads((root / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return " ".join(text.split())


def test_the_texts_say_what_was_kept():
    twice, found = kept["agreement"], kept["found"]
    pairs = [(one["id"], one["other_id"]) for one in kept["overlaps"]]
    assert set(pairs) >= KNOWN and kept["stored_twice"] == ["2044_5.png"]
    more = found["overlaps"] - len(KNOWN)
    smallest, largest = (f"{100 * pick(one['fraction'] for one in kept['overlaps']):.0f}%" for pick in (min, max))
    assert f"{found['overlaps']} pairs, {smallest} to {largest}" in markdown("11_dataset")
    agree = f"{twice['cells'] - twice['without_partner']} of {twice['cells']}"
    assert f"{agree} cells, at a median IoU of {twice['median_iou']:.2f}" in markdown("11_dataset")
    assert f"{found['overlaps']} pairs within train, {more} of them new" in markdown("00_paper")


@pytest.mark.skipif(not os.environ.get("SEGPC_DATA"), reason="needs SEGPC_DATA")
def test_the_official_training_set(tmp_path):
    data = find_dataset()
    if len(list_samples(data)) != 298 or (data / OVERLAPS).exists():
        pytest.skip("SEGPC_DATA is not the official training set, or was audited")
    split = split_samples(data)
    parts = ids(split)
    assert {name: digest(part) for name, part in parts.items()} == TRAINED_ON
    audit = audit_dataset(data, n_boot=200)
    summary = audit_summary(audit)
    pairs = {(one["id"], one["other_id"]) for one in summary["overlaps"]}
    assert pairs == {(one["id"], one["other_id"]) for one in kept["overlaps"]} and pairs >= KNOWN
    assert summary["found"] == kept["found"] and summary["stored_twice"] == ["2044_5.png"]
    assert summary["agreement"] == pytest.approx(kept["agreement"])
    shift = {one["camera"]: 512 * one["shift"] for one in summary["label_shift"]}
    assert shift["Olympus"] == pytest.approx(2.1, abs=0.2) and abs(shift["Nikon"]) < 0.2
    (tmp_path / "train").symlink_to(data / "train")  # with a file, two pictures move, towards training
    write_overlaps(tmp_path / OVERLAPS, list(audit.samples), audit.tables["overlaps"])
    after = ids(split_samples(tmp_path))
    assert set(after["train"]) - set(parts["train"]) == {"9455", "2044"}
    assert set(after["valid"]) == set(parts["valid"]) - {"9455"}
    assert set(after["holdout"]) == set(parts["holdout"]) - {"2044"}
