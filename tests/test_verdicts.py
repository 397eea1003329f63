"""The chapters of verdicts and of rivals, once every study has its file."""

import json
import shutil
from pathlib import Path

import matplotlib
import pytest

root = Path(__file__).parent.parent


def table(*variants, scores=("official", "pq", "ap50", "ap", "f1", "recall")):
    "Rows of a study: the reference first, every other variant worse by 0.02."
    rows = []
    for number, variant in enumerate(variants):
        off = {"difference": -0.02 * (number > 0), "low": -0.03 * (number > 0), "high": -0.01 * (number > 0)}
        rows += [{"variant": variant, "score": score, "mean": 0.8 + off["difference"]} | off for score in scores]
    return rows


def run_chapter(name, folder, monkeypatch):
    "Execute a chapter beside the results in a folder."
    monkeypatch.chdir(folder / "nbs")
    space = {"__name__": name}
    for cell in json.loads((root / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "nbdev_export" not in source:
            exec(source, space)
    return space


@pytest.fixture
def measured(tmp_path):
    "Kept results, and made-up ones of the studies that train networks."
    shutil.copytree(root / "results", tmp_path / "results")
    (tmp_path / "nbs").mkdir()
    parts = ("no nucleus channel", "no channel attention", "mean of the branches", "plain DeepLabv3+")
    parts += ("equalised", "jittered nuclei")
    cytoplasm = {"seeds": [0, 1, 2], "tables": {"balanced": table("as shipped", *parts)}}
    rivals = ("two stages, one scale", "three classes and a watershed", "Mask R-CNN")
    groups = ("overlapping", "small", "large", "mixed sizes")
    part = {"parameters": 10, "steps": 2, "epochs": 0.5, "cpu_seconds": 1.0}
    judged = {"seeds": [0], "preset": "light", "scale": 1.75, "cpu_seconds": 1.0, "pictures": {}}
    judged |= {"cells": dict.fromkeys(groups, 3)}
    judged["facts"] = {name: [{"trained": {"all": part}, "seconds per picture": 0.5}] for name in rivals}
    judged["tables"] = {"balanced": table(*rivals)} | {group: table(*rivals) for group in groups}
    ways = ("one scale", "two scales", "four scales", "three classes and a watershed", "Mask R-CNN", "seven Mask R-CNN")
    costs = [
        {"size": size, "way": way, "seconds": k + 1.0, "peak": 10.0 * (k + 1), "built": 5.0, "parameters": 10}
        for size in ("light", "paper")
        for k, way in enumerate(ways)
    ]
    files = {"cytoplasm": cytoplasm, "rivals": judged, "cost": {"rows": costs, "cells": 8}}
    for name, content in files.items():
        (tmp_path / "results" / "studies" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_every_claim_gets_its_verdict(measured, monkeypatch):
    said = run_chapter("89_what_holds", measured, monkeypatch)["said"]
    assert "not measured yet" not in set(said["verdict"])
    assert said.loc["first level: attention on channels", "verdict"] == "holds"
    assert said.loc["histogram equalisation", "verdict"] == "does not hold"
    assert said.loc["Mask R-CNN is worse on overlapping cells", "verdict"] == "holds (1 seed)"
    assert said.loc["the winner's ensemble needs more time and memory", "verdict"] == "holds"


def test_claims_wait_for_their_study(measured, monkeypatch):
    for name in ("cytoplasm", "rivals", "cost"):
        (measured / "results" / "studies" / f"{name}.json").unlink()
    said = run_chapter("89_what_holds", measured, monkeypatch)["said"]
    assert (said["verdict"] == "not measured yet").sum() == 12
    assert run_chapter("84_rivals_measured", measured, monkeypatch)["balanced"].empty


def test_rivals_are_shown(measured, monkeypatch):
    matplotlib.use("Agg")
    space = run_chapter("84_rivals_measured", measured, monkeypatch)
    assert list(space["facts"].index) == list(space["balanced"].index)
    assert space["by_group"].shape == (12, 5)
