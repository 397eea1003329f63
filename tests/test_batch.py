"""Folders of pictures: finished ones are skipped, a stopped run goes on, a cluster gives what one process gives."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
import torch

from segpc_nb import batch, results
from segpc_nb.batch import PredictOptions, predict_picture, predict_pictures
from segpc_nb.cells import iou_table
from segpc_nb.cli_predict import report
from segpc_nb.config import BundleConfig
from segpc_nb.hardware import keep_memory
from segpc_nb.images import write_image
from segpc_nb.inputs import name_pictures
from segpc_nb.journal import JOURNAL, read_journal
from segpc_nb.pipeline import SHIPPED, Segmenter, load_bundle, save_bundle
from segpc_nb.runtimes import missing_packages
from segpc_nb.synthetic import make_dataset

WANTED = PredictOptions()
needs_bundle = pytest.mark.skipif(
    not (SHIPPED / "bundle.json").exists(), reason="this copy comes without trained networks"
)


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    "Eight synthetic pictures."
    root = make_dataset(tmp_path_factory.mktemp("smears"), pictures=8, seed=3)
    return sorted(next(root.rglob("x")).iterdir())


STUB = Segmenter(
    lambda x: 40 * (0.35 - x[:, 1:2]),
    {1.75: lambda x: 40 * (0.7 - x[:, 1:2])},
    BundleConfig((60, 80), (1.75,), (32,)),
)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    "Three drawn pictures of one cell, and a pipeline of arithmetic in place of the networks."
    monkeypatch.setattr(batch, "load_segmenter", lambda options: STUB)
    for k in range(3):
        picture = np.full((60, 80, 3), (232, 215, 225), np.uint8)
        cv2.circle(picture, (30 + 5 * k, 30), 15, (150, 140, 200), -1)
        cv2.circle(picture, (30 + 5 * k, 30), 9, (90, 40, 130), -1)
        write_image(tmp_path / "x" / f"{k}.png", picture)
    return sorted((tmp_path / "x").iterdir())


def masks(out):
    "All masks of a folder of predictions, decoded."
    return {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED).tobytes() for path in (out / "y").iterdir()}


def same(a, b):
    "Do two folders hold the same masks and tables, floats at four decimals?"
    pd.testing.assert_frame_equal(*(pd.read_csv(out / "cells.csv", dtype={"picture": str}).round(4) for out in (a, b)))
    assert masks(a) == masks(b)


@needs_bundle
def test_a_process_that_predicts_keeps_its_memory():
    def pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)  # 64 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if not keep_memory(False):
        pytest.skip("not glibc")
    given_back = pages()
    batch.load_segmenter(WANTED)
    assert 2 * pages() < given_back


def test_a_report_tells_who_predicted(drawn, tmp_path):
    predict_pictures(drawn[:2], tmp_path / "out", PredictOptions(min_score=0.125))
    predict_pictures(drawn[2:], tmp_path / "out", PredictOptions(bundle=tmp_path))
    text = report(tmp_path / "out", drawn, tmp_path / "r.html").read_text(encoding="utf-8")
    ways = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["how"]["predicted by"]
    assert [(way["bundle"], way.get("min_score")) for way in ways] == [("of the package", 0.125), (str(tmp_path), None)]
    assert all(way["segpc_nb"] == version("segpc_nb") for way in ways)


def test_what_is_done_is_skipped_until_something_changed(drawn, tmp_path):
    out = tmp_path / "out"
    assert list(predict_pictures(drawn, out).cells.values()) == [1, 1, 1]
    before = masks(out)
    assert predict_pictures(drawn, out).skipped == ["0", "1", "2"]
    (out / "y" / "1_1.png").unlink()  # a mask is gone
    os.utime(drawn[0], ns=(1, 1))  # the date does not matter
    write_image(drawn[2], cv2.imread(str(drawn[2]))[:, ::-1, ::-1])  # a picture is another one
    assert list(predict_pictures(drawn, out).cells) == ["1", "2"]
    assert {name: masks(out)[name] for name in ("0_1.png", "1_1.png")} == {
        name: before[name] for name in ("0_1.png", "1_1.png")
    }
    assert list(predict_pictures(drawn, out, PredictOptions(select="keep-all")).cells) == ["0", "1", "2"]  # another way
    assert list(predict_pictures(drawn, out, PredictOptions(select="keep-all"), redo=True).cells) == ["0", "1", "2"]
    assert sorted(pd.read_csv(out / "cells.csv").picture.tolist()) == [0, 1, 2]


def test_a_torn_journal_costs_one_picture(drawn, tmp_path):
    out = tmp_path / "out"
    predict_pictures(drawn, out)
    text = (out / JOURNAL).read_text()
    (out / JOURNAL).write_text(text[:-30])
    (out / "cells.csv").unlink()
    again = predict_pictures(drawn, out)
    assert (list(again.cells), again.skipped) == (["2"], ["0", "1"])
    assert sorted(read_journal(out)) == ["0", "1", "2"] and len(pd.read_csv(out / "cells.csv")) == 3


def test_a_full_disk_is_reported_per_picture_and_nothing_is_half_done(drawn, tmp_path, monkeypatch):

    written = results.write_bytes

    def full(path, content):
        if path.parent.name != "y":
            return written(path, content)
        raise OSError(28, f"{path} was not written (No space left on device); free some space")

    with monkeypatch.context() as patched:
        patched.setattr(results, "write_bytes", full)
        failed = predict_pictures(drawn, tmp_path / "out").failed
    assert list(failed) == drawn and all("free some space" in why for why in failed.values())
    assert not read_journal(tmp_path / "out")
    assert list(predict_pictures(drawn, tmp_path / "out").cells) == ["0", "1", "2"]


def test_an_unforeseen_error_is_loud_and_ends_no_other_picture(drawn, tmp_path, monkeypatch, capsys):
    real = batch.predict_cells

    def broken(options, segmenter, picture):
        if picture.path == drawn[1]:
            raise KeyError("a bug")
        return real(options, segmenter, picture)

    monkeypatch.setattr(batch, "predict_cells", broken)
    found = predict_pictures(drawn, tmp_path / "out")
    assert list(found.cells) == ["0", "2"]
    assert found.failed == {drawn[1]: "unexpected KeyError: 'a bug'; please report it"}
    assert "Traceback" in capsys.readouterr().err


def test_one_patient_never_gets_the_cells_of_another(drawn, tmp_path):
    out = tmp_path / "out"
    for patient, picture in (("anna", drawn[0]), ("bert", drawn[1])):
        (tmp_path / patient).mkdir()
        shutil.copy(picture, tmp_path / patient / "1.png")
        os.utime(tmp_path / patient / "1.png", ns=(1, 1))
    assert list(predict_pictures([tmp_path / "anna/1.png"], out).cells) == ["1"]
    before = masks(out)
    for redo in (False, True):
        with pytest.raises(ValueError, match=r"anna/1.png; .*bert/1.png is another picture of the same name"):
            predict_pictures([tmp_path / "bert/1.png"], out, redo=redo)
    assert masks(out) == before
    (tmp_path / "anna").rename(tmp_path / "archive")  # the same picture in another place is done
    assert predict_pictures([tmp_path / "archive/1.png"], out).skipped == ["1"]


def test_a_second_run_into_the_same_folder_is_refused(drawn, tmp_path):
    with batch.one_writer(tmp_path / "out"), pytest.raises(ValueError, match="another run writes into"):
        predict_pictures(drawn, tmp_path / "out")
    assert len(predict_pictures(drawn, tmp_path / "out").cells) == 3


def test_other_options_are_said(drawn, tmp_path):
    predict_pictures(drawn, tmp_path / "out")
    lines = []
    predict_pictures(drawn, tmp_path / "out", PredictOptions(select="keep-all"), on_progress=lines.append)
    assert lines[0] == "3 pictures were predicted with other options, networks or version: predicted again"


@pytest.mark.parametrize("error", [BrokenPipeError("closed"), UnicodeEncodeError("ascii", "é", 0, 1, "no")])
def test_what_cannot_be_printed_is_predicted(drawn, tmp_path, error):
    def say(line):
        raise error

    found = predict_pictures(drawn, tmp_path / "out", on_progress=say)
    assert list(found.cells) == ["0", "1", "2"] and not found.failed
    assert len(pd.read_csv(tmp_path / "out" / "cells.csv")) == 3


def test_links_into_a_store_keep_their_names(drawn, tmp_path):
    blob = tmp_path / "store" / "ab12"
    blob.parent.mkdir()
    shutil.copy(drawn[0], blob)
    (tmp_path / "linked").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "linked" / name).symlink_to(blob)
    paths = list(name_pictures([tmp_path / "linked"]).values())
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert sorted(predict_pictures(paths, tmp_path / "out").cells) == ["a", "b"]


def test_a_done_picture_that_is_gone_is_named(drawn, tmp_path):
    predict_pictures(drawn, tmp_path / "out")
    drawn[1].unlink()
    drawn[1].symlink_to(tmp_path / "nowhere.png")
    found = predict_pictures(drawn, tmp_path / "out")
    assert (found.skipped, list(found.failed)) == (["0", "2"], [drawn[1]])


def test_a_pipe_is_refused_and_the_others_are_done(drawn, tmp_path):
    pipe = drawn[0].with_name("pipe.png")
    os.mkfifo(pipe)
    found = predict_pictures([*drawn, pipe], tmp_path / "out")
    assert "neither a file nor a folder" in found.failed[pipe] and len(found.cells) == 3


def test_a_line_that_was_edited_counts_for_nothing(drawn, tmp_path):
    out = tmp_path / "out"
    predict_pictures(drawn, out)
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    lines[0]["cells"][0]["score"] = 7
    lines[1]["cells"][0]["picture"] = "9"
    lines[2]["key"] = None
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines) + "[[1]]\n\x00\n")
    assert read_journal(out) == {}
    assert list(predict_pictures(drawn, out).cells) == ["0", "1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_table_of_what_is_done(drawn, tmp_path, number):
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from segpc_nb import batch
from test_batch import STUB
batch.load_segmenter = lambda options: STUB
def say(line):
    if line.startswith("1:"):
        os.kill(os.getpid(), {int(number)})
batch.predict_pictures([Path(path) for path in sys.argv[2:]], Path(sys.argv[1]), on_progress=say)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out"), *map(str, drawn)], check=False)
    assert done.returncode == 128 + number
    assert set(pd.read_csv(tmp_path / "out" / "cells.csv").picture) >= {0, 1}


@needs_bundle
def test_the_shipped_networks_work_offline_and_a_killed_run_goes_on(smears, tmp_path):
    blocked = """import socket, sys
def refuse(*a, **k): raise AssertionError('network')
socket.socket.connect = socket.create_connection = refuse
from segpc_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", blocked, "predict", str(smears[0].parent), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    journal = tmp_path / "cut" / JOURNAL
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(read_journal(tmp_path / "cut"))
    assert 2 <= done
    again = predict_pictures(smears, tmp_path / "cut", WANTED)
    assert len(again.skipped) >= done and len(again.skipped) + len(again.cells) == len(smears)
    same(tmp_path / "whole", tmp_path / "cut")
    assert len(pd.read_csv(tmp_path / "whole" / "cells.csv")) > len(smears)  # they find cells


@needs_bundle
def test_tiles_give_the_nuclei_of_the_whole(smears):
    segmenter = load_bundle()
    field = np.concatenate(
        [np.concatenate([cv2.imread(str(path))[:384, :512, ::-1] for path in smears[k : k + 2]], 1) for k in (0, 2)]
    )
    size = segmenter.config.nucleus_px * max(field.shape[0] / 768, field.shape[1] / 1024)
    from segpc_nb.nuclei import nuclei_in_tiles
    from segpc_nb.nucleus_size import network_grid
    from segpc_nb.pipeline import nuclei_of_box

    whole = segmenter.nuclei(field, size)
    tiled = nuclei_in_tiles(
        partial(
            nuclei_of_box, segmenter.nucleus_network, field, segmenter.config, segmenter.config.nucleus_flips, None
        ),
        field.shape[:2],
        network_grid(segmenter.config, field.shape[:2], size),
        tile=384,
    )
    overlap = iou_table(whole, tiled, "nucleus")
    assert len(whole) > 8 and abs(len(whole) - len(tiled)) <= 1
    assert np.mean(overlap.max(1) > 0.9) > 0.9


SLIDE = """
import resource, sys
from pathlib import Path
from segpc_nb import batch
from segpc_nb.batch import PredictOptions, predict_pictures
from segpc_nb.config import BundleConfig
from segpc_nb.pipeline import Segmenter
config = BundleConfig((384, 512), (1.75,), (64,), nucleus_px=50.0)
networks = lambda x: 40 * (0.35 - x[:, 1:2]), {1.75: lambda x: 40 * (0.7 - x[:, 1:2])}
batch.load_segmenter = lambda wanted: Segmenter(*networks, config)
found = predict_pictures([Path(sys.argv[1])], Path("out"), PredictOptions(nucleus_px=218.0))
assert not found.failed, found.failed
print(found.cells["slide"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_a_slide_of_20000_pixels_a_side_in_bounded_memory(tmp_path):
    side, block = 20_000, 400
    tile = np.full((block, block, 3), (232, 215, 225), np.uint8)
    busy = tile.copy()
    cv2.circle(busy, (200, 200), 180, (150, 140, 200), -1)
    cv2.circle(busy, (200, 200), 109, (90, 40, 130), -1)
    places = [(row, column) for row in range(side // block) for column in range(side // block)]
    blocks = (busy if row % 5 == 0 and column % 7 == 0 else tile for row, column in places)
    tifffile.imwrite(
        tmp_path / "slide.tif",
        blocks,
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(block, block),
        photometric="rgb",
        compression="zlib",
    )
    command = [sys.executable, "-c", SLIDE, str(tmp_path / "slide.tif")]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cells, peak = map(int, done.stdout.split()[-2:])
    assert cells == 10 * 8
    assert peak < 3000  # MB; the slide alone holds 1200
    outlines = json.loads((tmp_path / "out" / "slides" / "slide.geojson").read_text())["features"]
    areas = [shapely.geometry.shape(outline["nucleusGeometry"]).area for outline in outlines]
    assert np.allclose(areas, np.pi * 109**2, rtol=0.03)


MANY = 2000


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "The networks of the package without mirror images, in ONNX Runtime where it is installed."
    segmenter, folder = load_bundle(), tmp_path_factory.mktemp("quick")
    segmenter.config = replace(segmenter.config, flips=False, nucleus_flips=False)
    save_bundle(segmenter, folder, half=True)
    return PredictOptions(folder, nucleus_px=50, backend="torch" if missing_packages("onnxruntime") else "onnxruntime")


@pytest.fixture(scope="module")
def many(smears, tmp_path_factory):
    "A folder of many pictures, by links to a few."
    folder = tmp_path_factory.mktemp("many")
    for k in range(MANY):
        os.link(smears[k % len(smears)], folder / f"{k}{smears[0].suffix}")
    return folder


@pytest.fixture(scope="module")
def predicted(many, quick, tmp_path_factory):
    "What `segpc predict` makes of them, and its memory on the way: (pictures done, MB)."
    out = tmp_path_factory.mktemp("predicted")
    program = "import sys; from segpc_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    options = [
        "--out",
        str(out / "out"),
        "--bundle",
        str(quick.bundle),
        "--nucleus-px",
        str(quick.nucleus_px),
        "--backend",
        quick.backend,
    ]
    with open(out / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "predict", str(many), *options], stdout=log, stderr=log
        )
        resident = []
        while process.poll() is None:
            time.sleep(2)
            journal, status = out / "out" / JOURNAL, Path(f"/proc/{process.pid}/statm")
            if journal.exists() and status.exists():
                resident.append(
                    (
                        journal.read_bytes().count(b"\n"),
                        int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
                    )
                )
    assert process.returncode == 0, (out / "log").read_text()[-2000:]
    return out / "out", resident


@needs_bundle
@pytest.mark.slow
def test_two_thousand_pictures_with_flat_memory(predicted):
    out, resident = predicted
    table = pd.read_csv(out / "cells.csv")
    assert table.picture.nunique() > 0.75 * MANY and len(list((out / "y").iterdir())) == len(table)
    early = max(megabytes for done, megabytes in resident if done < MANY // 4)
    late = max(megabytes for done, megabytes in resident if done >= MANY // 4)
    print(f"resident: {early:.0f} MB in the first {MANY // 4} pictures, {late:.0f} MB afterwards")
    assert late < early + 100  # the table of all cells; a picture more costs less than 0.1 MB


@needs_bundle
@pytest.mark.slow
def test_two_workers_of_whom_one_is_killed_give_the_same(many, quick, predicted, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid
        told = []

        def tell(line):
            told.append(line)
            if len(told) == MANY // 2:
                os.kill(victim, signal.SIGKILL)

        found = predict_pictures(
            sorted(many.iterdir()), tmp_path / "two", quick, cluster=cluster.scheduler_address, on_progress=tell
        )
    assert not found.failed and len(found.cells) == len(told) == MANY
    same(predicted[0], tmp_path / "two")


@needs_bundle
def test_two_workers_with_the_usual_options_give_the_same(smears, tmp_path):
    distributed = pytest.importorskip("distributed")
    predict_pictures(smears[:4], tmp_path / "one", WANTED)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        found = predict_pictures(smears[:4], tmp_path / "two", WANTED, cluster=cluster.scheduler_address)
    assert not found.failed and sum(found.cells.values()) > 4
    same(tmp_path / "one", tmp_path / "two")


def test_a_worker_names_a_bad_picture(drawn, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    batch._worker_segmenter.cache_clear()
    assert "torn.png" in predict_picture(WANTED, tmp_path / "out", (0, "torn", tmp_path / "torn.png")).error
    entry = predict_picture(WANTED, tmp_path / "out", (0, "0", drawn[0])).entry
    batch._worker_segmenter.cache_clear()
    assert entry["picture"] == "0" and len(entry["cells"]) == 1 and json.loads(json.dumps(entry)) == entry


def test_a_picture_replaced_while_it_is_predicted_is_predicted_again(drawn, tmp_path, monkeypatch):
    real, first = batch.write_prediction, drawn[0].read_bytes()

    def replaced(options, out, picture, *found):
        if picture.path == drawn[0]:
            drawn[0].write_bytes(drawn[1].read_bytes())
        return real(options, out, picture, *found)

    monkeypatch.setattr(batch, "write_prediction", replaced)
    assert list(predict_pictures(drawn, tmp_path / "out").cells) == ["0", "1", "2"]
    monkeypatch.setattr(batch, "write_prediction", real)
    assert drawn[0].read_bytes() != first
    assert list(predict_pictures(drawn, tmp_path / "out").cells) == ["0"]


def test_what_version_0_1_wrote_is_read_and_predicted_again(drawn, tmp_path):
    out, lines = tmp_path / "out", []
    predict_pictures(drawn, out)
    old = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    for line in old:  # its lines had no path and no content hash, and its keys no version
        line["file"] = [1, 1]
        for name in ("path", "content", "shape"):
            del line[name]
        line["key"] = "bf70edd96df3a849"
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in old))
    assert sorted(read_journal(out)) == ["0", "1", "2"]
    assert list(predict_pictures(drawn, out, on_progress=lines.append).cells) == ["0", "1", "2"]
    assert lines[0].startswith("3 pictures were predicted with other options, networks or version")
