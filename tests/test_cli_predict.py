"""The words of the command line: help, completion, configs, and the commands on installations and data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segpc_nb import cli, doctor
from segpc_nb.dataset import check_samples, list_samples
from segpc_nb.encoders import LITE0_PACKAGE
from segpc_nb.images import write_image

root = Path(__file__).parent.parent
rows = re.findall(
    r"(?m)^\| `([^`]+)` \| .+ \|$",
    (root / "README.md").read_text(encoding="utf-8").partition("## If something goes wrong")[2],
)
EXAMPLES = {name: command.examples for name, command in cli.COMMANDS.items()}


def run(*words):
    return cli.main([str(word) for word in words])


def shell(*words, **variables):
    "The command in a process of its own."
    command = [sys.executable, "-c", "import sys; from segpc_nb.cli import main; sys.exit(main())", *map(str, words)]
    path = os.pathsep.join([*filter(None, [variables.pop("first", "")]), str(root)])
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": path, **variables},
    )


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "smears"
    assert run("synth", folder, "--pictures", "6") == 0
    return folder


@pytest.fixture(scope="module")
def enough(tmp_path_factory):
    "As many pictures as a training needs."
    folder = tmp_path_factory.mktemp("data") / "enough"
    assert run("synth", folder, "--pictures", "14") == 0
    return folder


def help_of(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        run(*words, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *EXAMPLES])
def test_help_fits_80_columns_and_ends_with_examples(command, capsys, monkeypatch):
    text = help_of([command] if command else [], capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    assert "<class" not in text and "null" not in text
    if command:
        assert text.rstrip().splitlines()[-1] == f"  {EXAMPLES[command][-1]}" and f"usage: segpc {command} " in text
    else:
        assert all(f"\n    {name} " in text for name in EXAMPLES) and "exit codes: 0" in text


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_understood(example):
    words = example.partition(" > ")[0].split()
    assert words[0] == "segpc" and cli.make_parser().parse_args(words[1:]).command == words[1]


def test_no_word_shows_the_help(capsys):
    assert run() == 2
    output = capsys.readouterr()
    assert output.out == "" and "convert-keras" in output.err and "exit codes" in output.err


def test_version(capsys):
    with pytest.raises(SystemExit):
        run("--version")
    assert re.fullmatch(r"segpc \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", [name for name in EXAMPLES if name != "train"])  # prints a preset, see test_cli
def test_a_printed_config_is_read_again(command, tmp_path, capsys):
    words = EXAMPLES[command][-1].partition(" > ")[0].split()[1:]
    with pytest.raises(SystemExit):
        run(*words, "--print_config")
    text = capsys.readouterr().out
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    read, typed = (
        cli.make_parser().parse_args(given)[command].as_dict()
        for given in ([*words, "--config", str(tmp_path / "options.yaml")], words)
    )
    assert {**read, "config": None} == {**typed, "config": None}


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
@pytest.mark.parametrize(
    "words, wanted",
    [
        ("segpc pre", "predict"),
        ("segpc predict --sel", "--select"),
        ("segpc predict --select f", "fuse"),
        ("segpc train ", "nucleus"),
    ],
)
def test_bash_completes(words, wanted):
    script = shell("--print-completion", "bash")
    assert script.returncode == 0 and script.stderr == ""
    parts = words.split(" ")
    words = f"COMP_WORDS=({' '.join(part or chr(34) * 2 for part in parts)}); COMP_CWORD={len(parts) - 1}"
    ask = f"{words}; _shtab_segpc; echo ${{COMPREPLY[@]}}"
    command = ["/bin/bash", "-c", f"{script.stdout}\n{ask}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert wanted in answer.stdout.split()


def test_every_shell_gets_a_script():
    for name in cli.SHELLS:
        assert "convert-keras" in shell("--print-completion", name).stdout
    assert "'tcsh'" in shell("--print-completion", "rc").stderr


def test_a_healthy_installation(capsys):
    assert run("doctor", "--json") == 0
    diagnosis = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in diagnosis["findings"]}
    assert {
        "python",
        "onnxruntime",
        "opencv-python-headless",
        "extra train",
        "memory",
        "disk",
        "GPU",
        "networks",
        "extra light",
    } <= names
    assert all(finding["fix"] for finding in diagnosis["findings"] if finding["level"] != "ok")
    assert run("doctor") == 0 and capsys.readouterr().out.rstrip().endswith("Healthy.")


def test_a_broken_installation(monkeypatch, capsys):
    there = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: {"opencv-python": "4.10", "tqdm": None}.get(name, there(name))
    )
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert run("doctor", "--json") == 1
    errors = {
        finding["name"]: finding
        for finding in json.loads(capsys.readouterr().out)["findings"]
        if finding["level"] == "error"
    }
    assert set(errors) >= {"OpenCV", "tqdm", "import torchvision"}
    assert (
        errors["tqdm"]["fix"].startswith("pip install 'tqdm")
        and "pip uninstall -y opencv-python" in errors["OpenCV"]["fix"]
    )


def test_a_broken_bundle_is_an_error(monkeypatch, tmp_path):
    from segpc_nb import pipeline

    (tmp_path / "bundle.json").write_text("{}")
    monkeypatch.setattr(pipeline, "SHIPPED", tmp_path)
    monkeypatch.delenv("SEGPC_DATA", raising=False)
    (finding,) = doctor.content_findings()
    assert (finding.name, finding.level) == ("networks", "error") and "bundle.json" in finding.found


def test_check_lists_every_problem_with_its_place(smears, tmp_path, capsys):
    assert run("check", smears) == 0
    assert "6 pictures" in capsys.readouterr().out
    assert run("synth", tmp_path / "bad", "--pictures", "4") == 0
    x, y = tmp_path / "bad/train/x", tmp_path / "bad/train/y"
    (x / "1000.bmp").write_bytes(b"torn")
    for path in y.glob("1001_*"):
        path.unlink()
    write_image(y / "77_1.png", np.full((8, 8), 20, np.uint8))
    write_image(y / "1002_9.png", np.full((8, 8), 60, np.uint8))
    (y / "notes.txt").touch()
    capsys.readouterr()
    assert run("check", tmp_path / "bad", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    found = {
        problem["file"]: (problem["split"], problem["level"], problem["problem"])
        for problem in result["problems"]
        if problem["level"] != "note"
    }
    assert {name: level for name, (_, level, _) in found.items()} == {
        "1000.bmp": "error",
        "1001.bmp": "warning",
        "77_1.png": "error",
        "1002_9.png": "error",
        "notes.txt": "warning",
    }
    assert all(split == "train" and "; " in text for split, _, text in found.values()) and result["errors"] == 3
    assert run("check", tmp_path / "bad") == 1
    assert "error    train 77_1.png: no picture belongs to this mask; masks are named" in capsys.readouterr().out
    assert len(check_samples(list_samples(tmp_path / "bad"))) == 5


def test_check_counts_gaps_once(smears, capsys):
    assert run("check", smears, "--json") == 0
    (note,) = json.loads(capsys.readouterr().out)["problems"]
    assert (note["level"], note["file"]) == ("note", "1003.bmp") and note["problem"].startswith("no mask number 2;")


def test_scales_of_a_data_set(smears, tmp_path, capsys):
    assert run("scales", smears, "--json", "--figure", tmp_path / "scales.svg") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cells"] == len(list((smears / "train/y").iterdir())) and "<svg" in (
        tmp_path / "scales.svg"
    ).read_text(encoding="utf-8")
    assert all(row["scale"] == pytest.approx(1.25 * row["peak"]) for row in result["scales"] if row["peak"] is not None)
    assert run("scales", smears) == 0 and "best score" in capsys.readouterr().out


def fake_client(folder, code):
    "A program `kaggle` that does as told."
    folder.mkdir()
    (folder / "kaggle").write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{code}\n")
    (folder / "kaggle").chmod(0o755)
    return str(folder)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_download_by_a_client(smears, tmp_path, capfd, monkeypatch):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "theirs"), "zip", smears)
    monkeypatch.setenv(
        "PATH",
        fake_client(
            tmp_path / "good",
            "assert sys.argv[1:4] == ['datasets', 'download', 'sbilab/segpc2021dataset']\n"
            f"shutil.copy({archive!r}, sys.argv[5] + '/segpc2021dataset.zip')",
        ),
    )
    assert run("download", tmp_path / "data") == 0
    output = capfd.readouterr().out
    assert output.index("CC BY-NC-SA 4.0") < output.index("train 6 pictures") and not (tmp_path / "data.part").exists()
    assert run("download", tmp_path / "data") == 0  # there already
    monkeypatch.setenv("PATH", fake_client(tmp_path / "nobody", "sys.exit('You must authenticate')"))
    assert run("download", tmp_path / "other") == 2
    errors = capfd.readouterr().err
    assert (
        "You must authenticate" in errors
        and "No account: make one at https://www.kaggle.com" in errors
        and "No network" in errors
    )
    monkeypatch.setenv(
        "PATH", fake_client(tmp_path / "liar", "pathlib.Path(sys.argv[5], 'segpc2021dataset.zip').write_bytes(b'half')")
    )
    assert run("download", tmp_path / "other") == 2
    assert (
        "no readable zip" in capfd.readouterr().err
        and not (tmp_path / "other").exists()
        and not (tmp_path / "other.part").exists()
    )


def test_download_without_a_client_says_what_to_do(smears, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    for words, message in {
        (): "`pip install kaggle`, or download the zip with a browser",
        ("--source", "ieee"): "IEEE DataPort has no client; log in, download the zip",
    }.items():
        assert run("download", tmp_path / "data", *words) == 2
        output = capsys.readouterr()
        assert (
            "CC BY-NC-SA 4.0" in output.out
            and message in output.err
            and f"segpc download {tmp_path / 'data'} --archive" in output.err
        )
    assert run("download", smears.parent, "--archive", "x.zip") == 0  # holds a split already
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    assert run("download", tmp_path / "full") == 2 and "holds something else" in capsys.readouterr().err


def test_reproduce_calls_the_script(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reproduce.py").write_text("import sys; print(*sys.argv[1:]); sys.exit('paper' in sys.argv)")
    assert run("reproduce", "--runs", ".", "--preset", "light", "--jobs", "2") == 0
    assert capfd.readouterr().out.split() == ["--preset", "light", "--out", str(Path("runs/light")), "--jobs", "2"]
    assert run("reproduce", "--runs", ".", "--preset", "paper") == 2 and "FAILED.ipynb below" in capfd.readouterr().err


def test_reproduce_knows_the_options_of_the_script():
    text = (root / "nbs/runs/reproduce.py").read_text(encoding="utf-8")
    assert all(f'"{option}"' in text for option in ("--preset", "--data", "--out", "--jobs"))


def no_split(tmp_path, enough):
    (tmp_path / "empty").mkdir()
    return shell("check", tmp_path / "empty")


def no_extra(tmp_path, enough):
    code = f"import sys; sys.modules[{LITE0_PACKAGE!r}] = None; from segpc_nb.cli import main; sys.exit(main())"
    words = ["train", "nucleus", "--preset", "smoke", "--data", str(enough), "--out", str(tmp_path / "o")]
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def another_run(tmp_path, enough):
    words = ("train", "nucleus", "--preset", "smoke", "--data", enough, "--out", tmp_path / "o", "--epochs")
    assert shell(*words, 1).returncode == 0
    return shell(*words, 2)


def no_libgl(tmp_path, enough):
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    diagnosis = shell("doctor", first=str(tmp_path))
    assert diagnosis.returncode == 1 and doctor.OPENCV_FIX in diagnosis.stdout
    return shell("synth", tmp_path / "o", first=str(tmp_path))


CAUSES = {
    "holds no split of": no_split,
    "needs the extra": no_extra,
    "holds another run": another_run,
    "libGL.so.1": no_libgl,
}


def test_the_troubles_of_the_readme_are_all_known():
    assert len(rows) == len(CAUSES) and all(any(row.startswith(start) for row in rows) for start in CAUSES)


@pytest.mark.parametrize("message", rows)
def test_the_troubles_of_the_readme_happen(message, enough, tmp_path):
    cause = next(cause for start, cause in CAUSES.items() if message.startswith(start))
    ended = cause(tmp_path, enough)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
