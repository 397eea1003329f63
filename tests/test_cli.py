"""The command line: its words, its files, its exit codes, and pictures that can't be read."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from typing import get_args

import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
import torch
import yaml
from fastcore.docments import docments
from pycocotools.coco import COCO

from segpc_nb import backends, batch, cli, config, keras_weights, pipeline, presets
from segpc_nb.cells import cell_from_parts
from segpc_nb.config import SELECTIONS, BundleConfig
from segpc_nb.images import read_mask, write_image
from segpc_nb.metrics import evaluate_cells
from segpc_nb.models import build_network, load_network
from segpc_nb.pipeline import Segmenter
from segpc_nb.released import RELEASED_PRESETS, ReleasedSegmenter
from segpc_nb.results import read_cells_csv, read_results, write_masks
from segpc_nb.submission import read_submission

SCALES = (0.5, 1.75)
STUB = Segmenter(
    lambda images: 40 * (0.35 - images[:, 1:2]),  # dark is nucleus
    dict.fromkeys(SCALES, lambda crops: 40 * (0.7 - crops[:, 1:2])),  # coloured is cell
    BundleConfig((60, 80), SCALES, (32, 32), (0.8,)),
)


@pytest.fixture
def smears(tmp_path, monkeypatch):
    "Two drawn pictures with annotation, and a pipeline of arithmetic in place of a bundle."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "load_bundle", lambda *place: STUB)
    rows, columns = np.mgrid[:60, :80]
    for id, places in {"7_a": [(20, 20, 15)], "10": [(30, 25, 11), (30, 60, 15)]}.items():
        picture, cells = np.full((60, 80, 3), (232, 215, 225), np.uint8), []
        for row, column, radius in places:
            distance = np.hypot(rows - row, columns - column)
            picture[distance < radius], picture[distance < 9] = (150, 140, 200), (90, 40, 130)
            cells.append(cell_from_parts(len(cells) + 1, (0, 0, 60, 80), distance < 9, distance < radius))
        write_image(tmp_path / "x" / f"{id}.bmp", picture)
        write_masks(tmp_path / "truth" / "y", id, cells, (60, 80))
    return tmp_path


def run(*words):
    return cli.main([str(word) for word in words])


def test_from_pictures_to_scores_and_submission(smears, capsys):
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    assert sorted(path.name for path in (smears / "out/y").iterdir()) == ["10_1.png", "10_2.png", "7_a_1.png"]
    mask = read_mask(smears / "out/y/10_1.png")
    assert mask.shape == (60, 80) and set(np.unique(mask)) == {0, 20, 40}
    table = read_cells_csv(smears / "out/cells.csv")
    assert (
        sorted(zip(table.picture, table.id)) == [("10", 1), ("10", 2), ("7_a", 1)] and table.score.between(0.5, 1).all()
    )
    capsys.readouterr()
    assert run("evaluate", "--truth", "truth", "--pred", "out", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    keys = {
        "official",
        "pq",
        "ap50",
        "f1",
        "recall",
        "precision",
        "aji",
        "nucleus_iou",
        "cytoplasm_iou",
        "cells",
        "pictures",
    }
    assert keys < scores.keys() and scores["cells"] == 3 and scores["pictures"] == 2
    assert scores["f1"] == 1 and scores["official"] > 0.9 and len(scores["ci"]["pq"]) == 2
    (truth, shapes), (found, _) = read_results(smears / "truth"), read_results(smears / "out")
    assert scores["official"] == evaluate_cells(truth, found, shapes)["official"]
    assert run("evaluate", "--truth", "truth", "--pred", "out") == 0
    assert "official" in capsys.readouterr().out
    assert run("submit", "--pred", "out", "--out", "submission.zip") == 0
    assert {id: len(cells) for id, cells in read_submission(smears / "submission.zip").items()} == {"7_a": 1, "10": 2}


def test_keep_all_numbers_masks_and_names_the_nucleus(smears):
    assert run("predict", "x", "--out", "out", "--bundle", "b", "--select", "keep-all") == 0
    table = read_cells_csv(smears / "out/cells.csv").query("picture == '10'")
    assert table.id.tolist() == list(range(1, len(table) + 1)) and set(table.nucleus) == {1, 2}
    assert not table.duplicated(["nucleus", "scale"]).any() and sorted(table.query("nucleus == 1").scale) == [0.5, 1.75]


@pytest.mark.parametrize("preset", RELEASED_PRESETS)
def test_the_released_way_keeps_every_plausible_cell(smears, monkeypatch, preset, capsys):
    def load(folder, preset, device):
        networks = dict.fromkeys((0.5, 1.75, 2.6, 3.0), lambda crops: 40 * (0.7 - crops[:, 1:2]) * (crops[:, 1:2] > 0))
        return ReleasedSegmenter(lambda images: 40 * (0.35 - images[:, 1:2]), networks, RELEASED_PRESETS[preset])

    monkeypatch.setattr("segpc_nb.released.load_released", load)
    for name in ("11", "12"):
        (smears / f"x/{name}.bmp").write_bytes((smears / "x/10.bmp").read_bytes())
    assert run("predict", "x", "--out", "out", "--bundle", "b", "--preset", preset) == (
        1 if preset == "released-bug" else 0
    )
    errors = capsys.readouterr().err
    assert ("12.bmp" in errors or "7_a.bmp" in errors) == (preset == "released-bug") and len(errors.splitlines()) <= 1
    table = read_cells_csv(smears / "out/cells.csv").query("picture == '10'")
    assert table.id.tolist() == list(range(1, len(table) + 1)) and set(table.nucleus) == {1, 2} and len(table) > 4
    assert not table.duplicated(["nucleus", "scale"]).any()
    read_results(smears / "out")


def test_bad_pictures_are_named_and_the_others_done(smears, capsys):
    (smears / "x/empty.png").write_bytes(b"")
    (smears / "x/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    write_image(smears / "x/deep.png", np.zeros((60, 80), np.uint16))
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("segpc: failed: ") for line in errors)
    assert all(any(name in line for line in errors) for name in ("empty.png", "torn.jpg", "deep.png"))
    assert set(read_cells_csv(smears / "out/cells.csv").picture) == {"7_a", "10"}


def test_predicting_again_replaces_and_keeps(smears):
    run("predict", "x", "--out", "out", "--bundle", "b", "--select", "keep-all")
    before = read_cells_csv(smears / "out/cells.csv")
    assert run("predict", "x/10.bmp", "--out", "out", "--bundle", "b") == 0
    after = read_cells_csv(smears / "out/cells.csv")
    assert (after.picture == "7_a").sum() == (before.picture == "7_a").sum()
    assert (after.picture == "10").sum() == len(list((smears / "out/y").glob("10_*"))) == 2
    read_results(smears / "out")  # every mask has its row


def test_a_stopped_run_leaves_whole_results(smears, monkeypatch, capsys):
    class Stopping(Segmenter):
        def segment(self, image, *settings, **given):
            if len(seen) == 1:
                raise KeyboardInterrupt
            seen.append(image)
            return super().segment(image, *settings, **given)

    seen = []
    monkeypatch.setattr(
        batch,
        "load_bundle",
        lambda *place: Stopping(STUB.nucleus_network, STUB.cell_networks, STUB.config),
    )
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 130
    assert capsys.readouterr().err.endswith("segpc: stopped\n")
    cells, _ = read_results(smears / "out")
    assert list(cells) == ["7_a"]
    monkeypatch.setattr(batch, "load_bundle", lambda *place: STUB)
    assert run("predict", "x", "--out", "out", "--bundle", "b", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"cells": {"10": 2}, "skipped": ["7_a"], "failed": {}, "left_out": []}


def test_the_size_of_nuclei_is_passed_on(smears, monkeypatch, capsys):
    given = []

    class Listening(Segmenter):
        def find_nuclei(self, image, nucleus_px, flips):
            given.append(nucleus_px)
            return super().find_nuclei(image, "field", flips)

    monkeypatch.setattr(
        batch,
        "load_bundle",
        lambda *place: Listening(STUB.nucleus_network, STUB.cell_networks, STUB.config),
    )
    monkeypatch.setattr(
        pipeline, "estimate_nucleus_px", lambda find, image, config, pixel_um: (33.0, find(image, 33.0, False))
    )
    assert run("predict", "x/10.bmp", "--out", "out", "--bundle", "b") == 0
    assert run("predict", "x/10.bmp", "--out", "out", "--bundle", "b", "--nucleus-px", "21") == 0
    assert given == [33.0, 21.0]
    assert run("predict", "x", "--out", "out2", "--bundle", "b", "--nucleus-px", "21", "--preset", "released") == 2
    assert "--nucleus-px 21.0 does not go with --preset released" in capsys.readouterr().err


def test_exports_are_read_back_by_others(smears, capsys):
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    cells, shapes = read_results(smears / "out")
    assert run("export", "--pred", "out", "--to", "coco", "--out", "cells.json") == 0
    coco = COCO(str(smears / "cells.json"))
    for image in coco.imgs.values():
        assert (smears / "x" / image["file_name"]).exists()  # the picture's own name
        id = image["file_name"].rpartition(".")[0]
        found = {
            (note["cell"], note["category_id"]): coco.annToMask(note) > 0
            for note in coco.loadAnns(coco.getAnnIds(image["id"]))
        }
        for k, cell in enumerate(cells[id], 1):
            top, left, bottom, right = cell.bbox
            assert np.array_equal(found[k, 1][top:bottom, left:right], cell.mask) and found[k, 1].sum() == cell.area
            assert np.array_equal(found[k, 2][top:bottom, left:right], cell.nucleus)
    assert run("export", "--pred", "out", "--to", "labels", "--out", "labels", "--pixel-size", "0.1") == 0
    assert tifffile.imread(smears / "labels/10.tif").shape == (2, *shapes["10"])
    assert (
        run(
            "export",
            "--pred",
            "out",
            "--to",
            "table",
            "--out",
            "cells.parquet",
            "--pictures",
            "x",
            "--pixel-size",
            "0.1",
        )
        == 0
    )
    table = pd.read_parquet(smears / "cells.parquet")
    assert np.allclose(table.cell_um2, 0.01 * table.cell_area) and (table.nucleus_blue < 140).all()
    assert run("export", "--pred", "out", "--to", "geojson", "--out", "qupath") == 0
    features = json.loads((smears / "qupath/10.geojson").read_text())["features"]
    for feature, cell in zip(features, cells["10"], strict=True):
        assert shapely.geometry.shape(feature["geometry"]).area == pytest.approx(cell.area, rel=0.03)
        assert shapely.geometry.shape(feature["nucleusGeometry"]).area == pytest.approx(cell.nucleus.sum(), rel=0.03)
    capsys.readouterr()
    assert run("export", "--pred", "out", "--to", "table", "--out", "t.csv", "--pictures", "x/10.bmp") == 2
    assert "no picture for 7_a" in capsys.readouterr().err


def test_training_needs_its_first_stage(smears, capsys):
    assert run("synth", "smears", "--pictures", "14") == 0
    assert run("train", "cytoplasm", "--out", "runs", "--data", "smears", "--preset", "smoke") == 2
    assert "run the nucleus stage with the same folder first" in capsys.readouterr().err
    assert run("train", "nucleus", "--out", "runs", "--data", "smears", "--scale", "1.75") == 2
    assert "--scale 1.75 is for the cytoplasm networks" in capsys.readouterr().err


def test_training_without_annotation_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("synth", "smears", "--pictures", "14") == 0
    shutil.copytree("smears", "no_masks")
    shutil.rmtree("no_masks/train/y")
    (tmp_path / "no_masks/train/y").mkdir()
    shutil.copytree("smears", "no_nuclei")
    for path in (tmp_path / "no_nuclei/train/y").iterdir():
        mask = read_mask(path)
        write_image(path, np.where(mask == 40, 20, mask).astype(np.uint8))
    shutil.copytree("smears", "one_picture")
    for path in sorted((tmp_path / "one_picture/train/x").iterdir())[1:]:
        path.unlink()
        for mask in (tmp_path / "one_picture/train/y").glob(f"{path.stem}_*"):
            mask.unlink()
    capsys.readouterr()
    for folder, message in (
        ("no_masks", "none of the .* training pictures has an annotated nucleus"),
        ("no_nuclei", "none of the .* training pictures has an annotated nucleus"),
        ("one_picture", "training needs 2 at least"),
    ):
        assert run("train", "nucleus", "--preset", "smoke", "--epochs", "1", "--data", folder, "--out", "runs") == 2
        assert re.search(message, capsys.readouterr().err), folder
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_training_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("synth", "smears", "--pictures", "14") == 0
    words = ("--out", "mine", "--preset", "smoke", "--data", "smears", "--epochs", "1")
    assert run("train", "nucleus", *words) == 0
    assert run("train", "cytoplasm", *words, "--scale", "1.75", "--cache", "crops") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["mine/nucleus/main", "mine/cytoplasm_1.75"]
    assert load_network("mine/cytoplasm_1.75/weights").config["in_channels"] == 4
    assert len(list((tmp_path / "crops").glob("*.npy"))) == 2
    assert run("train", "nucleus", *words[:-1], "2") == 2  # another configuration in the same folder
    assert "epochs: 1 there, 2 now" in capsys.readouterr().err
    next((tmp_path / "smears/train/y").iterdir()).unlink()
    assert run("train", "nucleus", *words) == 2  # other data in the same folder
    assert "holds another run (data:" in capsys.readouterr().err


def test_a_picture_without_cells_has_no_rows_and_can_be_scored(smears, capsys):
    write_image(smears / "blank/10.png", np.full((60, 80, 3), 230, np.uint8))
    assert run("predict", "blank", "--out", "out", "--bundle", "b") == 0
    assert len(read_cells_csv(smears / "out/cells.csv")) == 0
    (smears / "out/y").mkdir(exist_ok=True)
    capsys.readouterr()
    assert run("evaluate", "--truth", "truth", "--pred", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["official"] == 0


def test_pictures_without_cells_count_everywhere(smears, capsys):
    write_image(smears / "x/blank.png", np.full((60, 80, 3), 230, np.uint8))
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    assert run("export", "--pred", "out", "--to", "coco", "--out", "cells.json") == 0
    images = json.loads((smears / "cells.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == ["10.bmp", "7_a.bmp", "blank.png"]
    assert run("export", "--pred", "out", "--to", "geojson", "--out", "qupath") == 0
    assert json.loads((smears / "qupath/blank.geojson").read_text())["features"] == []
    capsys.readouterr()
    assert run("evaluate", "--truth", "truth", "--pred", "out", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["left_out"] == {"without annotation": ["blank"], "not predicted": []}
    cell = cell_from_parts(1, (20, 20, 30, 30), np.ones((10, 10), bool), np.ones((10, 10), bool))
    write_masks(smears / "truth/y", "blank", [cell], (60, 80))  # somebody sees one there
    assert run("evaluate", "--truth", "truth", "--pred", "out", "--json") == 0
    missed = json.loads(capsys.readouterr().out)
    assert missed["cells"] == scores["cells"] + 1 and missed["recall"] < scores["recall"]
    page = ("report", "--pred", "out", "--pictures", "x", "--truth", "truth", "--out", "r.html")
    assert run(*page) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', (smears / "r.html").read_text(encoding="utf-8"))[1])
    shown = {score["name"]: score["value"] for score in data["scores"]}
    assert shown["official"] == pytest.approx(missed["official"]) and len(data["pictures"]) == 3


def test_pictures_outside_of_the_annotation_judge_nobody(smears, capsys):
    shutil.copytree(smears / "truth", smears / "half")
    for mask in (smears / "half/y").glob("10_*"):
        mask.unlink()
    scores = {}
    for truth in ("truth", "half"):
        assert run("evaluate", "--truth", truth, "--pred", "truth", "--json") == 0
        scores[truth] = json.loads(capsys.readouterr().out)
    assert scores["half"]["pq"] == scores["half"]["precision"] == 1.0
    assert scores["half"]["left_out"]["without annotation"] == ["10"] and scores["truth"]["pictures"] == 2


def test_an_export_never_stands_in_for_the_table(smears, capsys):
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    assert run("export", "--pred", "out", "--to", "table", "--out", "truth/cells.csv") == 2
    assert "choose another name" in capsys.readouterr().err
    for size in ("0", "-1", "1e200", ".nan"):
        assert run("export", "--pred", "out", "--to", "table", "--out", "t.csv", "--pixel-size", size) == 2
        assert "allowed are 0.001 to 100 um" in capsys.readouterr().err


def test_the_exported_table_names_the_nucleus(smears):
    assert run("predict", "x", "--out", "out", "--bundle", "b", "--select", "keep-all") == 0
    assert run("export", "--pred", "out", "--to", "table", "--out", "t.csv") == 0
    ours, theirs = (pd.read_csv(smears / name, dtype={"picture": str}) for name in ("out/cells.csv", "t.csv"))
    assert ours["nucleus"].tolist() == theirs["nucleus"].tolist() and len(ours) == 6


def test_another_picture_of_the_same_name_is_not_measured(smears, capsys):
    assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    shutil.copytree("x", "y")
    shutil.copy("y/7_a.bmp", "y/10.bmp")
    capsys.readouterr()
    words = ("export", "--pred", "out", "--to", "table", "--out", "t.csv", "--pictures")
    assert run(*words, "y") == 2 and "y/10.bmp is not the picture that was predicted as 10" in capsys.readouterr().err
    assert run(*words, "x") == 0


def test_files_keep_the_umask(smears):
    before = os.umask(0o077)
    try:
        assert run("predict", "x", "--out", "out", "--bundle", "b") == 0
    finally:
        os.umask(before)
    assert not [path for path in (smears / "out").rglob("*") if path.is_file() and path.stat().st_mode & 0o077]


def test_an_annotation_is_never_overwritten(smears, capsys):
    before = {path: path.read_bytes() for path in (smears / "truth").rglob("*.*")}
    assert run("predict", "x", "--out", "truth", "--bundle", "b") == 2
    assert "choose another --out" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (smears / "truth").rglob("*.*")}


def test_options_from_a_file(smears):
    (smears / "options.yaml").write_text("pictures: [x]\nout: out\nbundle: b\nselect: keep-all\n", encoding="utf-8")
    words = ["predict", "--config", "options.yaml", "x"]
    assert run(*words) == 0
    assert len(read_cells_csv(smears / "out/cells.csv")) == 6  # 3 nuclei, 2 scales


@pytest.mark.parametrize(
    "words, message",
    [
        (["predcit", "x"], "'predcit', did you mean 'predict'. The commands are doctor, synth"),
        (["abracadabra"], "no command 'abracadabra'; The commands are"),
        (["--predict", "x"], "segpc --predict|predict"),
        (["predict", "x"], "missing: --out"),
        (["predict", "--out", "out"], "missing: pictures"),
        (["predict", "x", "--outt", "out"], "did you mean --out?"),
        (["predict", "x", "--out", "out", "--nucleus-px", "abc"], "--nucleus-px abc: expected a number"),
        (["train", "nucleus", "--out", "out", "--train.lrr", "1"], "did you mean --train.lr?"),
        (["train", "nucleus", "--out", "out", "--train.lr", "-1"], "lr = -1.0, allowed: a number > 0"),
        (
            ["train", "nucleus", "--out", "out", "--preset", "heavy"],
            "neither one of smoke, light, strong, paper nor a YAML file",
        ),
        (["predict", "x", "--out", "out", "--bundle", "b", "--select", "best"], "keep-all"),
        (["predict", "x", "--out", "out", "--bundle", "b", "--preset", "paper"], "released-bug"),
        (
            ["predict", "x", "--out", "out", "--bundle", "b", "--preset", "released", "--select", "fuse"],
            "leave one of them out",
        ),
        (["predict", "x", "--out", "out", "--bundle", "b", "--preset", "released"], "cytoplasm_0.5: holds no network"),
        (
            ["predict", "x", "--out", "out", "--bundle", "b", "--colour", "red"],
            "--colour red; `segpc predict --help` shows the words",
        ),
        (["predict", "nothing", "--out", "out", "--bundle", "b"], "nothing: no such file or folder"),
        (["predict", "x", "twin", "--out", "out", "--bundle", "b"], "have the same name"),
        (["evaluate", "--truth", "truth", "--pred", "x"], "no folder y"),
        (["evaluate", "--truth", "truth", "--pred", "foreign"], "no picture in common"),
        (["evaluate", "--truth", "truth", "--pred", "small"], "picture 10 has"),
        (["submit", "--pred", "truth", "--out", "submission.doc"], "allowed are .zip"),
        (["submit", "--pred", "nobody", "--out", "s.zip"], "holds no mask"),
        (["synth", "data", "--pictures", "0"], "allowed are 1 and more"),
        (["synth", "data", "--pictures", "many"], "--pictures many: expected a whole number"),
        (["check", "nowhere"], "nowhere: no such folder; check the name"),
        (["scales", "truth"], "holds no split of SegPC-2021"),
        (["scales", "x", "--figure", "a.doc"], "allowed are .png, .pdf and .svg"),
        (["reproduce", "--runs", "x"], "x holds no reproduce.py: the run notebooks are in the repository"),
        (["train", "stain", "--out", "out"], "'nucleus', 'cytoplasm'"),
    ],
)
def test_wrong_words_end_with_2_and_one_line(smears, capsys, words, message):
    write_image(smears / "twin/10.png", np.zeros((60, 80, 3), np.uint8))
    cell = cell_from_parts(1, (0, 0, 4, 4), np.eye(4, dtype=bool), np.ones((4, 4), bool))
    write_masks(smears / "foreign/y", "99", [cell], (60, 80))
    write_masks(smears / "small/y", "10", [cell], (30, 40))
    (smears / "nobody/y").mkdir(parents=True)
    capsys.readouterr()
    assert run(*words) == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and output.err.startswith("segpc: error: ")
    assert re.search(message, output.err), output.err
    assert not (smears / "out").exists()


def test_no_bundle_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "SHIPPED", tmp_path)
    write_image(tmp_path / "a.png", np.full((60, 80, 3), 230, np.uint8))
    assert run("predict", tmp_path / "a.png", "--out", tmp_path / "out") == 2
    assert "make reproduce" in capsys.readouterr().err
    assert run("predict", tmp_path / "a.png", "--out", tmp_path / "out", "--preset", "released") == 2
    assert "--preset released needs --bundle" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no bundle"):
        pipeline.load_bundle(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is cpu"):
        pipeline.load_bundle(tmp_path, "abacus")


def test_choices_are_those_of_the_library():
    assert get_args(config.Method) == ("project", *RELEASED_PRESETS)
    assert get_args(config.Backend) == (*backends.BACKENDS, "auto")
    help_of = {name: cli.command_parser(name).format_help() for name in ("predict", "train")}
    words = "".join(help_of["predict"].split())  # a long list is broken at hyphens
    for word in (*SELECTIONS, *get_args(config.Method), *get_args(config.Backend)):
        assert word in words, word
    for name in (field.name for field in dataclasses.fields(config.TrainConfig)):
        assert f"--train.{name} " in help_of["train"], name
    assert "--bundle.cell_threshold " in help_of["train"] and "--bundle.scales" not in help_of["train"]


def test_every_option_is_explained():
    for name, command in cli.COMMANDS.items():
        notes = docments(command.function)
        for word in inspect.signature(command.function).parameters:
            assert notes[word], (name, word)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_printed_preset_is_read_back(name, tmp_path, capsys):
    assert run("train", "nucleus", "--preset", name, "--print_config") == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert presets.load_preset(path) == presets.load_preset(name)
    for option in ("--preset", "--config"):
        assert run("train", "cytoplasm", option, path, "--print_config") == 0
        assert capsys.readouterr().out == path.read_text(encoding="utf-8")


def test_a_run_goes_on_from_its_own_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("synth", "smears", "--pictures", "14") == 0
    changes = ("--train.lr", "1e-3", "--train.seed", "3", "--train.network.decoder_channels", "[32, 24, 16, 12, 8]")
    words = ("train", "nucleus", "--out", "mine", "--data", "smears")
    assert run(*words, "--preset", "smoke", "--train.epochs", "1", *changes) == 0
    kept = yaml.safe_load((tmp_path / "mine/nucleus/main/preset.yaml").read_text(encoding="utf-8"))
    manifest = json.loads((tmp_path / "mine/nucleus/main/manifest.json").read_text(encoding="utf-8"))
    assert manifest["preset_file"] == "preset.yaml" and manifest["config"]["lr"] == 1e-3
    assert (kept["nucleus"]["lr"], kept["nucleus"]["seed"], kept["nucleus"]["epochs"]) == (1e-3, 3, 1)
    before = (tmp_path / "mine/nucleus/main/latest.pt").stat().st_mtime_ns
    assert run(*words, "--preset", "mine/nucleus/main/preset.yaml") == 0  # taken as it is
    assert (tmp_path / "mine/nucleus/main/latest.pt").stat().st_mtime_ns == before
    assert (
        run("train", "nucleus", "--out", "again", "--data", "smears", "--config", "mine/nucleus/main/preset.yaml") == 0
    )
    first, second = (load_network(f"{out}/nucleus/main/weights").state_dict() for out in ("mine", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert run(*words, "--preset", "smoke", "--train.epochs", "1") == 2
    assert "lr: 0.001 there, 0.003 now" in capsys.readouterr().err


def test_help_and_typos_do_not_load_torch():
    code = "import sys; from segpc_nb.cli import main; assert main(['predcit']) == main([]) == 2; "
    code += "main(['--help']) if len(sys.argv) > 1 else 0; assert not {'torch', 'cv2', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_convert_keras_makes_a_network(tmp_path, capsys, monkeypatch):
    settings = {"name": "unet", "widths": (3, 4), "activation": "sigmoid"}
    monkeypatch.setitem(keras_weights.KERAS_NETWORKS, "U-Net", (settings, keras_weights.unet_order))
    rng, network = np.random.default_rng(0), build_network(**settings)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        order = keras_weights.unet_order(network)
        file.attrs["layer_names"] = [f"conv2d_{k}".encode() for k in range(len(order))]
        for k, name in enumerate(order):
            shapes = keras_weights.keras_shapes(network.get_submodule(name))
            file.create_group(f"conv2d_{k}").attrs["weight_names"] = [
                f"conv2d_{k}/{tensor}:0".encode() for tensor, _ in shapes
            ]
            for tensor, shape in shapes:
                file[f"conv2d_{k}/conv2d_{k}/{tensor}:0"] = rng.normal(0, 0.2, shape).astype(np.float32)
    assert run("convert-keras", tmp_path / "a.hdf5", tmp_path / "bundle/nucleus") == 0
    output = capsys.readouterr()
    assert "U-Net" in output.out and len(output.out.splitlines()) == 1 and output.err == ""
    answer = load_network(tmp_path / "bundle/nucleus")(torch.rand(2, 3, 16, 24))
    assert answer.shape == (2, 1, 16, 24) and 0 <= answer.min() and answer.max() <= 1


def test_convert_keras_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "text.hdf5").write_text("hello")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.attrs["layer_names"] = [b"dense_1"]
        file.create_group("dense_1").attrs["weight_names"] = [b"dense_1/kernel:0"]
        file["dense_1/dense_1/kernel:0"] = np.zeros((5, 2), np.float32)
    cases = {
        ("missing.hdf5", "out"): "missing.hdf5: no such file",
        ("text.hdf5", "out"): "text.hdf5: can't be read as HDF5 weights",
        ("other.hdf5", "out"): "some other network",
        ("other.hdf5", "text.hdf5"): "is a file; give the folder",
        ("other.hdf5",): "out",
    }
    for words, message in cases.items():
        assert run("convert-keras", *(tmp_path / word for word in words)) == 2
        output = capsys.readouterr()
        assert (
            output.out == ""
            and len(output.err.splitlines()) == 1
            and output.err.startswith("segpc: error: ")
            and message in output.err
        ), output.err
        assert not (tmp_path / "out").exists()


def test_synth_makes_the_official_layout(tmp_path, capsys):
    assert run("synth", tmp_path / "data", "--pictures", 1, "--seed", 3) == 0
    assert len(list((tmp_path / "data/train/x").iterdir())) == 1 and any((tmp_path / "data/train/y").iterdir())
    assert run("evaluate", "--truth", tmp_path / "data/train", "--pred", tmp_path / "data/train") == 0
