"""The command line as people meet it: quick, with its own words, and with the next step at the end."""

import json
import subprocess
import sys

import numpy as np
import pytest

from segpc_nb import batch, cli
from segpc_nb.config import BundleConfig
from segpc_nb.images import write_image
from segpc_nb.pipeline import Segmenter
from segpc_nb.synthetic import make_dataset

LIGHT = """
import sys
from segpc_nb.cli import main
data = sys.argv[1]
for words in (
    ["--help"],
    ["check", data],
    ["scales", data],
    ["evaluate", "--truth", data, "--pred", data + "/train"],
    ["submit", "--pred", data + "/train", "--out", data + "/s.zip"],
    ["report", "--pred", data + "/train", "--pictures", data + "/train/x", "--out", data + "/r.html"],
    ["export", "--pred", data + "/train", "--to", "table", "--out", data + "/t.csv"],
    ["apply-review", data, data + "/none.json"],
):
    try:
        main(words)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, words
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), pictures=2)


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_light_commands_load_no_torch(data):
    subprocess.run([sys.executable, "-c", LIGHT, str(data)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "x", "--out", "o", "--min-score", "5"], "--min-score 5.0: allowed are 0 to 1"),
        (["predict", "x", "--out", "o", "--nucleus-px", "abc"], "--nucleus-px abc: expected a number"),
        (["predict", "x"], "missing: --out"),
        (["predict", "x", "--outt", "o"], "unrecognized arguments: --outt o, did you mean --out?"),
        (["evaluate", "--truth", "t", "--pred", "p", "--min-score", "x"], "--min-score x: expected a number"),
        (["synth"], "missing: out"),
        (["evluate"], "no command 'evluate', did you mean 'evaluate'?"),
    ],
)
def test_own_words(capsys, words, said):
    code, _, error = run(capsys, *words)
    assert code == 2 and error.startswith(f"segpc: error: {said}") and error.count("\n") == 1


def test_a_device_that_is_not_there(capsys, data):
    code, _, error = run(capsys, "predict", data / "train/x", "--out", data / "o", "--device", "abacus")
    assert code == 2 and "--device abacus: can't be used here; there is cpu" in error and "Expected one of" not in error


def test_check_is_content_with_what_synth_made(capsys, data):
    assert run(capsys, "check", data)[1].splitlines()[-1].startswith("0 errors, 0 warnings")


def test_evaluate_finds_the_annotation_at_any_depth(capsys, data):
    code, text, _ = run(capsys, "evaluate", "--truth", data, "--pred", data / "train", "--json")
    assert code == 0 and json.loads(text)["official"] == 1.0


def test_a_report_that_is_replaced_is_named(capsys, data, tmp_path):
    words = ["report", "--pred", data / "train", "--pictures", data / "train/x", "--out", tmp_path / "r.html"]
    assert "was a report already" not in run(capsys, *words)[1]
    assert f"{tmp_path / 'r.html'} was a report already, and is replaced" in run(capsys, *words)[1]


def test_options_are_explained():
    text = " ".join(cli.command_parser("predict").format_help().split()).replace("- ", "-")  # broken lines
    for words in (
        "fuse, their mean",
        "nms, the surest",
        "released-bug, with its wrong",
        "(default: cpu)",
        "mps, or auto",
    ):
        assert words in text


def test_a_command_ends_with_the_next_one(capsys, monkeypatch, tmp_path):
    nothing = Segmenter(lambda x: 0 * x[:, :1] - 9, {1.75: lambda x: x[:, :1]}, BundleConfig((60, 80), (1.75,), (32,)))
    monkeypatch.setattr(batch, "load_segmenter", lambda options: nothing)
    write_image(tmp_path / "x" / "1.png", np.full((60, 80, 3), 230, np.uint8))
    words = ["predict", tmp_path / "x", "--out", tmp_path / "found"]
    assert "next:" not in run(capsys, *words)[1]  # nobody reads along
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    text = run(capsys, *words)[1]
    assert f"next: counts in {tmp_path / 'found'}/summary.csv; segpc report --pred {tmp_path / 'found'}" in text
    json.loads(run(capsys, *words, "--json")[1])
