"""Faults of running commands: nothing lost, nothing silent. Each is real: a full disk, no rights, no memory, a kill.

`SEGPC_WRITE=1 pytest tests/test_faults.py` writes the counts into results/robustness.json.
"""

import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_batch import STUB
from test_training import TINY, Blobs, same_state, with_dropout

from segpc_nb import batch, journal
from segpc_nb.cli import main
from segpc_nb.history import HISTORY
from segpc_nb.images import write_image
from segpc_nb.models import build_network, save_network
from segpc_nb.nucleus_size import network_grid
from segpc_nb.report import outline_keys
from segpc_nb.results import read_masks
from segpc_nb.training import fit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts, capabilities and forks of Linux")
COUNTS = Path(__file__).parent.parent / "results" / "robustness.json"
FORKS = multiprocessing.get_context("forkserver")  # one process that has imported all, and has no threads
FORKS.set_forkserver_preload(["segpc_nb.batch", "segpc_nb.cli", "segpc_nb.report", "segpc_nb.training"])
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile"}  # audit events of work on files


def count_steps(folder, kill_at, log):
    "Note every step on the files of a folder, and end at one of them as if the plug were pulled."
    numbers, inside = count(1), os.fsencode(folder)

    def step(event, words):
        if event not in STEPS or not isinstance(words[0], (str, bytes, os.PathLike)):
            return
        writes = event != "open" or (words[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and os.fsencode(words[0]).startswith(inside):
            number = next(numbers)
            os.write(log, b"%d\n" % number)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)


def give_up_rights():
    "Root may write everywhere; without capabilities it is a user as others."
    if ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError("capset")


def limit_memory(more):
    "Let this process have only so many bytes more than it has."
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def train(folder, data=None):
    "As `segpc train` does it: what is wrong ends with one line and 2."
    try:
        fit(with_dropout(), data or Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), TINY, folder)
        torch.manual_seed(1)
        save_network(build_network("unet", widths=(32, 64)), folder / "network")
    except (OSError, ValueError) as error:
        print(f"segpc: error: {error}", file=sys.stderr)
        return 2
    return 0


def work(command, log, steps, folder, hold, kill_at, prepare):
    "In a process of its own: a command with arithmetic in place of the networks."
    for number, path in ((1, log), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    real, pictures = batch.predict_cells, count()

    def predict_cells(*words):
        while next(pictures) >= 2 and hold.exists():
            time.sleep(0.01)
        return real(*words)

    batch.load_segmenter = lambda options: STUB
    batch.predict_cells = predict_cells
    torch.set_num_threads(1)
    if prepare:
        prepare()
    count_steps(folder, kill_at, os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    sys.exit(command() if callable(command) else main([str(word) for word in command]))


class Case:
    "A folder of pictures, and commands that work on it in processes of their own."

    def __init__(self, folder, out=None):
        self.folder, self.out = folder, out or folder / "out"
        self.log, self.steps, self.hold = folder / "log", folder / "steps", folder / "hold"

    def begin(self, *command, kill_at=None, prepare=None):
        self.log.unlink(missing_ok=True)
        (command,) = command if callable(command[0]) else (command,)
        words = (command, self.log, self.steps, self.out, self.hold, kill_at, prepare)
        process = FORKS.Process(target=work, args=words)
        process.start()
        return process

    def run(self, *command, **how):
        process = self.begin(*command, **how)
        process.join(300)
        assert process.exitcode is not None, "hangs"
        return process.exitcode

    def predict(self, **how):
        return self.run(*predicting(self), **how)

    def begin_and_hold(self, **how):
        "Predict two pictures, and wait with the third until the file `hold` is gone."
        self.hold.touch()
        process = self.begin(*predicting(self), **how)
        while len(journal.read_journal(self.out)) < 2:
            assert process.is_alive(), self.words
            time.sleep(0.01)
        return process

    @property
    def words(self):
        return self.log.read_text(errors="replace")

    def state(self):
        "All files but the lock; the order of the journal's lines means nothing, nor do times of the training."
        found = {}
        for path in sorted(path for path in self.out.rglob("*") if path.is_file() and path.name != ".lock"):
            content = path.read_bytes()
            found[str(path.relative_to(self.out))] = (
                sorted(content.split(b"\n")) if path.suffix == ".jsonl" else content
            )
        return found


def draw(folder, pictures=4):
    "Pictures of one or two cells."
    for k in range(pictures):
        picture = np.full((60, 80, 3), (232, 215, 225), np.uint8)
        for left in (20, 60)[: 1 + k % 2]:
            cv2.circle(picture, (left + k, 30), 14, (150, 140, 200), -1)
            cv2.circle(picture, (left + k, 30), 8, (90, 40, 130), -1)
        write_image(folder / "x" / f"{k}.png", picture)
    return Case(folder)


@pytest.fixture
def case(tmp_path):
    return draw(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 5 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, left):
    "Fill a disk up to some bytes."
    with open(folder / "filler", "wb", buffering=0) as file:
        free = os.statvfs(folder)
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - left)))


@pytest.fixture(scope="module")
def noted():
    "Counts of what came of faults and kills; they are kept where SEGPC_WRITE is set."
    found = {"faults": [], "kills": []}
    yield found
    if os.environ.get("SEGPC_WRITE"):
        kept = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
        COUNTS.write_text(json.dumps(kept | found, indent=1) + "\n", encoding="utf-8")


def review(case):
    "A review that rejects the first cell of a picture of two."
    cells = read_masks(case.out / "y")["1"]
    entry = {"picture": "1", "outline": outline_keys(cells)[0], "cell": 1, "mark": "reject", "type": "", "note": ""}
    path = case.folder / "review.json"
    path.write_text(json.dumps({"format": "segpc review", "version": 1, "cells": [entry]}))
    return path


def predicting(case):
    return "predict", case.folder / "x", "--out", case.out


def ignore_hang_up():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Hanging(Blobs):
    "In the second epoch the terminal goes."

    def __getitem__(self, index):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == self.count + 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return super().__getitem__(index)


def commands(case, pred):
    "What is made of predictions."
    to = partial(lambda kind, out: ("export", "--pred", pred, "--to", kind, "--out", case.out / out))
    return {
        "export coco": to("coco", "cells.json"),
        "export geojson": to("geojson", "qupath"),
        "export labels": to("labels", "labels"),
        "export table": (*to("table", "table.csv"), "--pictures", case.folder / "x"),
        "report": ("report", "--pred", pred, "--pictures", case.folder / "x", "--out", case.out / "report.html"),
    }


def on_full_disk(case, disk, name, command, room, noted):
    "A command on a full disk says so; with room again it makes what it makes elsewhere."
    whole, before = Case(case.folder, case.folder / "whole"), case.state()
    fill(disk, room)
    code, words = case.run(*command), case.words
    assert code in (1, 2) and "Traceback" not in words, words
    assert "No space left on device" in words, words
    after = case.state()
    (disk / "filler").unlink()
    assert case.run(*command) == 0, case.words
    noted["faults"].append({"fault": "full disk", "command": name, "exit": code})
    return whole, before, after


def test_predict_on_a_full_disk(case, small_disk, noted):
    whole = Case(case.folder, case.folder / "whole")
    assert whole.predict() == 0
    for room in (0, 4096, 12_288, 20_480):  # nothing; the table; some masks; masks and a part of the journal
        case.out = small_disk / f"out{room}"
        case.out.mkdir()
        on_full_disk(case, small_disk, "predict", predicting(case), room, noted)
        assert case.state() == whole.state()


def test_a_line_that_did_not_fit_is_not_half_there(small_disk):
    entry = {"picture": "0", "key": "k", "slide": False, "cells": [], "path": "x" * 20_000}
    journal.append_entry(small_disk, entry)
    before = (small_disk / journal.JOURNAL).read_bytes()
    fill(small_disk, 4096)
    with pytest.raises(OSError, match="No space left"):
        journal.append_entry(small_disk, entry | {"picture": "1"})
    assert (small_disk / journal.JOURNAL).read_bytes() == before


@pytest.mark.parametrize("name", list(commands(Case(Path()), "")))
def test_what_is_made_of_predictions_on_a_full_disk(name, case, small_disk, noted):
    pred = case.out
    assert case.predict() == 0
    case.out = small_disk / "made"
    case.out.mkdir()
    on_full_disk(case, small_disk, name, commands(case, pred)[name], 0, noted)
    made, case.out = case.state(), case.folder / "made"
    assert case.run(*commands(case, pred)[name]) == 0 and case.state() == made and made


def test_apply_review_on_a_full_disk(case, small_disk, noted):
    assert case.predict() == 0
    shutil.copytree(case.out, small_disk / "out")
    path, whole = review(case), Case(case.folder, case.out)
    case.out = small_disk / "out"
    *_, before, after = on_full_disk(case, small_disk, "apply-review", ("apply-review", case.out, path), 8192, noted)
    assert {name: after.get(name) for name in before} == before  # the folder is as it was
    assert whole.run("apply-review", whole.out, path) == 0 and case.state() == whole.state()


def test_a_checkpoint_on_a_full_disk(case, small_disk, noted):
    whole = case.out
    assert case.run(partial(train, whole)) == 0, case.words
    middle = int(case.steps.read_text().split()[-1]) // 2
    case.out = small_disk / "run"
    assert case.run(partial(train, case.out), kill_at=middle) == -signal.SIGKILL
    before = case.state()
    fill(small_disk, 4096)
    assert case.run(partial(train, case.out)) == 2
    assert "Traceback" not in case.words and "No space left on device" in case.words
    assert case.state()["latest.pt"] == before["latest.pt"]
    (small_disk / "filler").unlink()
    fill(small_disk, 600_000)  # enough for the checkpoints, not for the network
    assert case.run(partial(train, case.out)) == 2
    assert "Traceback" not in case.words and "model.safetensors was not written (No space left" in case.words
    assert same_state(whole, case.out)
    noted["faults"] += [{"fault": "full disk", "command": name, "exit": 2} for name in ("checkpoint", "save_network")]


def test_a_folder_that_may_not_be_written_to(case, noted):
    assert case.predict() == 0
    pred, path = case.out, review(case)
    case.out = case.folder / "locked"
    case.out.mkdir()
    for place in (case.out, pred, pred / "y"):
        place.chmod(0o555)
    todo = commands(case, pred) | {
        "predict": ("predict", case.folder / "x", "--out", case.out / "new"),
        "predict again": ("predict", case.folder / "x", "--out", pred, "--redo"),
        "apply-review": ("apply-review", pred, path),
        "train": (partial(train, case.out / "run"),),
    }
    before = Case(case.folder, pred).state()
    for name, command in todo.items():
        code = case.run(*command, prepare=give_up_rights)
        assert code in (1, 2) and "Permission denied" in case.words and "Traceback" not in case.words, case.words
        noted["faults"].append({"fault": "folder without rights", "command": name, "exit": code})
    assert Case(case.folder, pred).state() == before and not case.state()
    for place in (case.out, pred, pred / "y"):
        place.chmod(0o755)


def killed(case, command, kills, noted, name, equal=lambda a, b: a.state() == b.state(), start=None):
    "Kill a command at random steps, each time in a new folder; started again, it makes what it makes undisturbed."

    def begun(place):
        case.out = case.folder / place
        if start:
            shutil.copytree(start, case.out)
        return Case(case.folder, case.out)

    whole = begun("whole")
    assert case.run(*command(case)) == 0, case.words
    steps = int(case.steps.read_text().split()[-1])
    moments = np.random.default_rng(0).choice(np.arange(1, steps + 1), min(kills, steps), replace=False)
    for moment in sorted(moments.tolist()):
        other = begun(f"killed{moment}")
        assert case.run(*command(case), kill_at=moment) == -signal.SIGKILL, case.words
        assert case.run(*command(case)) == 0, case.words
        assert equal(whole, other), f"killed at step {moment} of {steps}"
    noted["kills"].append({"command": name, "steps": steps, "kills": len(moments), "other_results": 0})


def kill_predict(case, kills, noted):
    killed(case, predicting, kills, noted, "predict")


def kill_training(case, kills, noted):
    killed(
        case,
        lambda case: (partial(train, case.out),),
        kills,
        noted,
        "train",
        lambda a, b: (
            same_state(a.out, b.out)
            and a.state()["network/model.safetensors"] == b.state()["network/model.safetensors"]
        ),
    )


def kill_review(case, kills, noted):
    assert case.predict() == 0
    path = review(case)
    killed(case, lambda case: ("apply-review", case.out, path), kills, noted, "apply-review", masks_and_table, case.out)


def masks_and_table(a, b):
    "What counts of a reviewed folder; the killed review stands in the history, as taken back."

    def counts(of):
        kept = {name: of.state()[name] for name in of.state() if not name.startswith((HISTORY, journal.JOURNAL))}
        return kept, journal.read_journal(of.out)

    return counts(a) == counts(b)


def kill_others(case, kills, noted):
    assert case.predict() == 0
    pred = case.out
    for name in commands(case, pred):
        (case.folder / name).mkdir()
        (case.folder / name / "x").symlink_to(case.folder / "x")
        killed(Case(case.folder / name), lambda case, name=name: commands(case, pred)[name], kills, noted, name)


KILLED = {"predict": kill_predict, "train": kill_training, "apply-review": kill_review, "others": kill_others}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_command_makes_the_same_when_it_is_started_again(name, case, noted):
    KILLED[name](case, 1 if name == "others" else 3, noted)


@pytest.mark.slow  # 10 minutes
@pytest.mark.parametrize("name", KILLED)
def test_a_command_killed_at_many_steps_makes_the_same_when_it_is_started_again(name, case, noted):
    KILLED[name](case, 10 if name == "others" else 40, noted)


def test_two_commands_with_one_folder(case, noted):
    first, second = case.begin_and_hold(), Case(case.folder, case.out)
    second.log = case.folder / "log2"
    for command in (predicting(case), ("apply-review", case.out, case.folder / "r")):
        (case.folder / "r").write_text('{"format": "segpc review", "version": 1, "cells": []}')
        assert second.run(*command) == 2 and "another run writes into" in second.words
        noted["faults"].append({"fault": "another run has the folder", "command": command[0], "exit": 2})
    case.hold.unlink()
    first.join()
    whole = Case(case.folder, case.folder / "whole")
    assert first.exitcode == 0 and whole.predict() == 0 and case.state() == whole.state()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_ends_in_order_but_not_what_nohup_began(case, ignored, noted):
    process = case.begin_and_hold(prepare=ignore_hang_up if ignored else None)
    os.kill(process.pid, signal.SIGHUP)
    if ignored:
        case.hold.unlink()
    process.join()
    assert process.exitcode == (0 if ignored else 128 + signal.SIGHUP)
    done = {row.split(",")[0] for row in (case.out / "cells.csv").read_text().splitlines()[1:]}
    assert done == ({"0", "1", "2", "3"} if ignored else {"0", "1"})
    noted["faults"].append({"fault": "SIGHUP", "command": f"{'nohup ' * ignored}predict", "exit": process.exitcode})


def test_a_training_that_loses_its_terminal_is_saved(case, noted):
    whole = Case(case.folder, case.folder / "whole")
    assert whole.run(partial(train, whole.out)) == 0
    assert case.run(partial(train, case.out, Hanging(8, 3, (16, 16)))) == 128 + signal.SIGHUP, case.words
    assert (case.out / "latest.pt").exists() and not (case.out / "network").exists()
    assert case.run(partial(train, case.out)) == 0 and same_state(whole.out, case.out)
    noted["faults"].append({"fault": "SIGHUP", "command": "train", "exit": 128 + signal.SIGHUP})


def test_a_picture_too_large_for_the_memory(case, noted):
    assert case.predict() == 0
    before = case.state()
    cv2.imwrite(str(case.folder / "x" / "2_large.png"), np.zeros((9000, 9000, 3), np.uint8))
    shutil.rmtree(case.out)
    assert case.predict(prepare=partial(limit_memory, 2**29)) == 1
    assert "segpc: failed: " in case.words and "Traceback" not in case.words, case.words
    assert case.state() == before
    noted["faults"].append({"fault": "memory", "command": "predict", "exit": 1})


def test_pictures_that_go_while_they_wait(case, noted):
    draw(case.folder, 6)
    process = case.begin_and_hold()  # the fourth and fifth are read by now
    (case.folder / "x" / "5.png").unlink()
    case.hold.unlink()
    process.join()
    assert process.exitcode == 1 and "5.png" in case.words and "o such file" in case.words, case.words
    assert "Traceback" not in case.words and sorted(journal.read_journal(case.out)) == list("01234")
    noted["faults"].append({"fault": "picture deleted while running", "command": "predict", "exit": 1})


def test_links_in_a_ring_and_what_is_no_picture(case, noted):
    assert case.predict() == 0
    whole = case.state()
    shutil.rmtree(case.out)
    x = case.folder / "x"
    (x / "ring").symlink_to(x)
    (x / "5.png").symlink_to("6.png")
    (x / "6.png").symlink_to("5.png")
    os.mkfifo(x / "7.png")
    (x / "8.png").symlink_to("/dev/zero")
    with open(x / "9.png", "wb") as file:
        file.truncate(3 * 10**9)
    assert case.predict(prepare=partial(limit_memory, 2**30)) == 1
    failed = case.words.count("segpc: failed: ")
    assert "Traceback" not in case.words and failed == 5, case.words
    assert case.state() == whole
    noted["faults"] += [{"fault": "ring of links, pipe, /dev/zero, 3 GB", "command": "predict", "exit": 1}]


def test_sizes_of_nuclei_that_no_picture_has(case, capsys, noted):
    learnt = replace(STUB.config, nucleus_px=50.0)
    for size in (0.05, 2, -1, 0, float("nan"), float("inf")):
        assert main([str(word) for word in (*predicting(case), "--nucleus-px", size)]) == 2
        assert f"--nucleus-px {size}" in capsys.readouterr().err and not case.out.exists()
        if size != 2:  # the command is stricter than the function
            with pytest.raises(ValueError, match="nucleus_px"):
                network_grid(learnt, (60, 80), size)
        noted["faults"].append({"fault": f"--nucleus-px {size}", "command": "predict", "exit": 2})
