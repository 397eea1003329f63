"""A day: two patients' folders are predicted, marked in a browser, corrected and exported; all counts agree."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile

from segpc_nb import batch, cli
from segpc_nb.config import BundleConfig
from segpc_nb.images import write_image
from segpc_nb.pipeline import Segmenter
from segpc_nb.results import read_results, write_masks
from segpc_nb.submission import read_submission
from segpc_nb.synthetic import make_picture

DASH = "\N{EN DASH}"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCALES = (0.5, 1.75)
STUB = Segmenter(  # dark is nucleus, more blue than red is cell
    lambda x: 40 * (0.35 - x[:, 1:2]),
    dict.fromkeys(SCALES, lambda x: 40 * (x[:, 2:3] - x[:, :1]) + 400 * x[:, 3:]),
    BundleConfig((240, 320), SCALES, (64, 64), (-1,)),
)
NAMES = ["anna/1", "anna/2", "bert/1", "bert/2"]  # nothing is in the last


def run(*words):
    assert cli.main([str(word) for word in words]) == 0, words


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Pictures of two patients, their annotation, and their predictions by arithmetic in place of networks."
    monkeypatch.setattr(batch, "load_segmenter", lambda options: STUB)
    patients, truth, found = (tmp_path / name for name in ("patients", "truth", "found"))
    for k, id in enumerate(NAMES[:3]):
        image, cells = make_picture(np.random.default_rng(k))
        for folder in (patients, truth / "x"):
            write_image(folder / f"{id}.png", image)
        write_masks(truth / "y", id, cells, image.shape[:2])
    for folder in (patients, truth / "x"):
        write_image(folder / "bert/2.png", np.full_like(image, 235))
    run("predict", patients, "--out", found)
    return patients, truth, found


def rows(found):
    "Rows of summary.csv by patient and picture."
    with open(found / "summary.csv", encoding="utf-8") as file:
        return {(row["level"], row["patient"], row["picture"]): row for row in csv.DictReader(file)}


def counts(found):
    "Cells of every picture, as the masks say."
    return dict.fromkeys(NAMES, 0) | {id: len(cells) for id, cells in read_results(found)[0].items()}


def exported(found, out):
    "Cells of every picture, as each export says."
    for kind, name in (("coco", "coco.json"), ("geojson", "qupath"), ("labels", "labels"), ("table", "cells.csv")):
        run("export", "--pred", found, "--to", kind, "--out", out / name)
    coco = json.loads((out / "coco.json").read_text())
    images = {image["id"]: image["file_name"].removesuffix(".png") for image in coco["images"]}
    cells = [images[cell["image_id"]] for cell in coco["annotations"] if cell["category_id"] == 1]
    table = pd.read_csv(out / "cells.csv").picture.tolist()
    run("submit", "--pred", found, "--out", out / "submission.zip")
    submitted = read_submission(out / "submission.zip")
    return {
        "images": sorted(images.values()),
        "coco": {id: cells.count(id) for id in NAMES},
        "geojson": {id: len(json.loads((out / f"qupath/{id}.geojson").read_text())["features"]) for id in NAMES},
        "labels": {id: int(tifffile.imread(out / f"labels/{id}.tif")[1].max()) for id in NAMES},
        "table": {id: table.count(id) for id in NAMES},
        "submission": {id: len(submitted.get(id, [])) for id in NAMES},
    }


def test_every_command_sees_the_same_pictures(folders, tmp_path, capsys):
    patients, truth, found = folders
    cells, summary = counts(found), rows(found)
    assert all(cells[id] for id in NAMES[:3]) and cells["bert/2"] == 0
    assert {id: int(summary["picture", id.split("/")[0], id]["plasma_cells"]) for id in NAMES} == cells
    assert int(summary["patient", "anna", ""]["plasma_cells"]) == cells["anna/1"] + cells["anna/2"]
    assert int(summary["all", "", ""]["nucleated_cells"]) >= sum(cells.values())
    assert pd.read_csv(found / "cells.csv").patient.value_counts()["bert"] == cells["bert/1"]
    told = exported(found, tmp_path / "exported")
    assert told.pop("images") == NAMES and all(told[kind] == cells for kind in told), told
    capsys.readouterr()
    run("evaluate", "--truth", truth, "--pred", found, "--json")
    scores = json.loads(capsys.readouterr().out)
    run("report", "--pred", found, "--pictures", patients, "--truth", truth, "--out", tmp_path / "r.html")
    page = json.loads((tmp_path / "r.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert [picture["id"] for picture in page["pictures"]] == NAMES and scores["pictures"] == 4
    assert page["scores"][0]["value"] == scores["official"]
    found_again = json.loads((found / "predicted.jsonl").read_text().splitlines()[0])
    run("predict", patients / "anna", "--out", found)  # given in another way, they keep their names
    assert counts(found) == cells and "done before: 2" in capsys.readouterr().out
    assert found_again["picture"] == "anna/1" and len(found_again["nuclei"]) >= cells["anna/1"]


def test_a_table_says_whose_pictures_these_are(folders, tmp_path, capsys):
    patients, _, found = folders
    (tmp_path / "lab.csv").write_text("picture,patient,slide\nanna/1.png,P1,a\nanna/2,P1,b\nbert/1,P2,c\nbert/2,=2,c\n")
    run("predict", patients, "--out", found, "--patients", tmp_path / "lab.csv")
    assert {patient for _, patient, _ in rows(found)} == {"P1", "P2", "'=2", ""}
    assert pd.read_csv(found / "cells.csv").slide.value_counts()["c"] == counts(found)["bert/1"]
    (tmp_path / "lab.csv").write_text("picture,patient\nanna/1.png,P1\n")
    assert cli.main(["predict", str(patients), "--out", str(found), "--patients", str(tmp_path / "lab.csv")]) == 2
    assert "has no row for picture anna/2 (3 such pictures); add it" in capsys.readouterr().err


@pytest.fixture
def page(folders, tmp_path):
    "The report, open in a browser."
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    patients, truth, found = folders
    run("report", "--pred", found, "--pictures", patients, "--truth", truth, "--out", tmp_path / "report.html")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab, trouble = chromium.new_page(viewport={"width": 1280, "height": 900}), []
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else 0)
        tab.goto((tmp_path / "report.html").as_uri())
        yield tab
        assert trouble == []
        chromium.close()


def shown(page):
    "The first table of the report: (patient, picture) -> its other cells."
    lines = page.locator("#summary tbody tr").all()
    texts = [[cell.inner_text() for cell in line.locator("td").all()] for line in lines]
    return {(text[0], text[1]): text[2:] for text in texts}


def agrees(row, text):
    "Does a row of summary.csv say what the report says?"
    percent = [f"{float(row[name]):.1f}" if row[name] else DASH for name in ("plasma_percent", "plasma_percent_low")]
    ratio = f"{float(row['nc_ratio_median']):.2f}" if row["nc_ratio_median"] else DASH
    wanted = [row["plasma_cells"], row["nucleated_cells"], percent[0], ratio, row["doubtful_cells"]]
    return wanted == [text[0], text[1], text[2], text[4], text[6]] and text[3].startswith(percent[1])


def test_a_day(folders, page, shoot, tmp_path):
    *_, found = folders
    before, summary = counts(found), rows(found)
    table = shown(page)
    assert all(agrees(summary["picture", id.split("/")[0], id], table[id.split("/")[0], id]) for id in NAMES), table
    assert agrees(summary["patient", "anna", ""], table["anna", "2 pictures"])
    assert agrees(summary["all", "", ""], table["all", "4 pictures"])
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shoot(page, f"day_{scheme}")
    page.locator('#gallery .card[data-key="anna/1_1"]').click()
    page.locator("#mark-reject").click()
    page.locator("#close").click()
    page.locator('#gallery .card[data-key="bert/1_2"]').click()
    page.locator("#mark-other").click()
    page.locator("#type").fill("lymphocyte")
    page.locator("#close").click()
    assert int(shown(page)["all", "4 pictures"][0]) == sum(before.values()) - 2
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "review.json")
    run("apply-review", found, tmp_path / "review.json")
    after = before | {"anna/1": before["anna/1"] - 1, "bert/1": before["bert/1"] - 1}
    assert counts(found) == after
    assert all(agrees(rows(found)[key], shown(page)[key[1], key[2]]) for key in rows(found) if key[0] == "picture")
    told = exported(found, tmp_path / "exported")
    assert told.pop("images") == NAMES and all(told[kind] == after for kind in told), told
    run("apply-review", found, tmp_path / "review.json", "--undo")
    assert counts(found) == before and rows(found) == summary
