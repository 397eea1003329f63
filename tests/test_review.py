"""A day of review: report in the browser, marks, `segpc apply-review`, exports, and back again."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from segpc_nb import cli, review
from segpc_nb.batch import PredictOptions, pictures_to_do, read_numbered, write_prediction
from segpc_nb.cells import cell_from_parts
from segpc_nb.images import write_image
from segpc_nb.journal import append_entry, read_earlier_table, read_journal, write_results_table
from segpc_nb.report import outline_keys
from segpc_nb.results import read_results
from segpc_nb.synthetic import make_picture

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def add_prediction(found, path, seed):
    "Write the cells of a drawn picture as `predict` would."
    image, cells = make_picture(np.random.default_rng(seed))
    write_image(path, image)
    scored = [
        cell_from_parts(k, c.bbox, c.nucleus, c.mask, image.shape[:2], score=0.3 + 0.1 * k)
        for k, c in enumerate(cells, 1)
    ]
    earlier = read_earlier_table(found)
    append_entry(found, write_prediction(PredictOptions(), found, read_numbered((0, path.stem, path)), scored))
    write_results_table(found, earlier, read_journal(found))


@pytest.fixture
def folders(tmp_path):
    "Pictures and their predictions; the name of one picture looks like a formula."
    for name, seed in (("3", 3), ("=4", 4)):
        add_prediction(tmp_path / "found", tmp_path / "pictures" / f"{name}.png", seed)
    return tmp_path / "pictures", tmp_path / "found"


def run(*words):
    return cli.main([str(word) for word in words])


def counts(found):
    return {id: len(cells) for id, cells in read_results(found)[0].items()}


def content(found):
    "Bytes of masks and table."
    return {path.name: path.read_bytes() for path in (*(found / "y").iterdir(), found / "cells.csv")}


def write_marks(path, found, marks):
    "A review as the page writes it; marks: (picture, number) -> mark."
    keys, cells = {id: outline_keys(cells) for id, cells in read_results(found)[0].items()}, []
    for (id, k), mark in marks.items():
        entry = {"picture": id, "cell": k, "outline": keys[id][k - 1], "mark": mark, "type": "", "note": ""}
        cells.append(entry | ({"type": "blast"} if mark == "other" else {}))
    path.write_text(json.dumps({"format": "segpc review", "version": 1, "cells": cells}), encoding="utf-8")
    return path


def test_a_day_of_review(folders, tmp_path, capsys):
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    (pictures, found), page = folders, tmp_path / "report.html"
    before, files = counts(found), content(found)
    report = ("report", "--pred", found, "--pictures", pictures, "--out", page, "--min-score", 0.45)
    assert run(*report) == 0
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        tab = context.new_page()
        tab.goto(page.as_uri())
        assert tab.locator('#cells tr[data-key="3_1"]').count() == 0  # its score is 0.4; the others keep their numbers
        for key, mark in (("3_2", "r"), ("=4_3", "o"), ("=4_2", "a")):
            tab.click(f'#cells tr[data-key="{key}"]')
            tab.keyboard.press(mark)
            if mark == "o":
                tab.keyboard.type("lymphocyte")
                tab.keyboard.press("Enter")
            tab.keyboard.press("Escape")
        tab.click('#cells tr[data-key="3_4"]')
        tab.keyboard.press("n")
        tab.keyboard.type("=cmd")
        tab.click("#close")
        with tab.expect_download() as download:
            tab.click("#download")
        download.value.save_as(tmp_path / "review.json")
        capsys.readouterr()
        assert run("apply-review", found, tmp_path / "review.json") == 0
        said = capsys.readouterr().out
        assert said.startswith("1 accepted, 1 rejected, 1 of another type, 1 with a note\n") and "review/1" in said
        after = {id: count - 1 for id, count in before.items()}
        assert counts(found) == after
        run("apply-review", found, tmp_path / "review.json", "--json")  # once more
        result = json.loads(capsys.readouterr().out)
        assert (result["former_state"], result["cells"]) == (None, sum(after.values())) and counts(found) == after
        table = pd.read_csv(found / "cells.csv", keep_default_na=False)
        assert len(table) == sum(after.values()) and table["note"].tolist().count("'=cmd") == 1
        assert table[table["review"] == "accepted"][["picture", "id"]].values.tolist() == [["'=4", 2]]
        assert run("export", "--pred", found, "--to", "coco", "--out", tmp_path / "cells.json") == 0
        coco = json.loads((tmp_path / "cells.json").read_text())["annotations"]
        assert sum(annotation["category_id"] == 1 for annotation in coco) == sum(after.values())
        assert run(*report) == 0  # a new report knows what was accepted
        tab = context.new_page()
        tab.goto(page.as_uri())
        tab.select_option("#filter", "accept")
        assert tab.locator("#cells tbody tr").evaluate_all("nodes => nodes.map(n => n.dataset.key)") == ["=4_2"]
        tab.select_option("#filter", "note")
        assert tab.locator("#cells tbody td").last.inner_text() == "=cmd"
        browser.close()
    assert run("apply-review", found, tmp_path / "review.json", "--undo") == 0
    assert content(found) == files and "taken back" in capsys.readouterr().out


def test_a_review_that_was_cut_off_is_mended(folders, tmp_path, monkeypatch):
    _, found = folders
    files = content(found)
    marks = write_marks(tmp_path / "review.json", found, {("3", 1): "reject", ("=4", 2): "other", ("=4", 1): "accept"})

    def full_disk(*words):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(review, "rewrite_table", full_disk)
        assert run("apply-review", found, marks) == 2
    assert content(found) != files  # half done
    assert run("apply-review", found, marks) == 0
    assert counts(found) == {id: len(cells) for id, cells in read_results(found)[0].items()}
    assert sorted(path.name for path in (found / "review").iterdir()) == ["1-undone", "2"]
    assert run("apply-review", found, marks, "--undo") == 0 and content(found) == files


def test_pictures_predicted_later_survive_the_way_back(folders, tmp_path):
    pictures, found = folders
    files, before = content(found), counts(found)
    marks = write_marks(tmp_path / "review.json", found, {("3", 1): "reject", ("3", 2): "accept"})
    assert run("apply-review", found, marks) == 0
    add_prediction(found, pictures / "5.png", 5)
    table = pd.read_csv(found / "cells.csv", keep_default_na=False)
    assert table["review"].tolist().count("accepted") == 1  # the journal knows it too
    later = counts(found)["5"]
    assert run("apply-review", found, marks, "--undo") == 0
    assert counts(found) == before | {"5": later}
    assert {name: files[name] for name in files if name != "cells.csv"}.items() <= content(found).items()


def test_all_cells_of_a_picture_may_leave(folders, tmp_path, capsys):
    pictures, found = folders
    n = counts(found)["3"]
    marks = write_marks(tmp_path / "review.json", found, {("3", k): "reject" for k in range(1, n + 1)})
    assert run("apply-review", found, marks) == 0
    assert "3" not in counts(found) and read_journal(found)["3"]["cells"] == []
    assert run("report", "--pred", found, "--pictures", pictures, "--out", tmp_path / "r.html") == 0
    assert run("apply-review", found, marks) == 0 and "nothing changed" in capsys.readouterr().out


def test_reviewed_pictures_are_not_predicted_again(folders, tmp_path):
    pictures, found = folders
    assert run("apply-review", found, write_marks(tmp_path / "review.json", found, {("3", 1): "reject"})) == 0
    paths, lines = {path.stem: path for path in sorted(pictures.iterdir())}, []
    todo = pictures_to_do(paths, found, read_journal(found), "other options", False, lines.append)
    assert [id for _, id, _ in todo] == ["=4"] and "reviewed: kept" in lines[-1]
    assert len(pictures_to_do(paths, found, read_journal(found), "other options", True, lines.append)) == 2


def test_what_is_refused(folders, tmp_path, capsys):
    pictures, found = folders
    files = content(found)
    marks = write_marks(tmp_path / "review.json", found, {("3", 1): "reject", ("=4", 1): "accept"})
    other = tmp_path / "other"
    add_prediction(other, tmp_path / "elsewhere" / "9.png", 9)
    (tmp_path / "notes.html").write_text("my notes")
    shutil.copytree(found, tmp_path / "changed")
    (tmp_path / "changed" / "y" / "3_1.png").write_bytes(files["3_2.png"])
    for words, said in (
        (("apply-review", pictures, marks), "holds no predictions; give the --out of `segpc predict`"),
        (("apply-review", found, found / "cells.csv"), "no JSON"),
        (("apply-review", found, tmp_path / "none.json"), "none.json"),
        (("apply-review", other, marks), "it is the review of another folder"),
        (("apply-review", tmp_path / "changed", marks), "the cells changed since the report was made"),
        (("apply-review", found, marks, "--undo"), "no review is in force there"),
        (("report", "--pred", found, "--pictures", pictures, "--out", tmp_path / "notes.html"), "is not a report"),
    ):
        assert run(*words) == 2
        assert said in capsys.readouterr().err
    assert content(found) == files and (tmp_path / "notes.html").read_text() == "my notes"
    assert not (found / "review").exists()
