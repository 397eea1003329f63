"""Training: presets, resuming after a kill, losses against independent implementations."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.data import Dataset

from segpc_nb.augmentation import region_augmentation
from segpc_nb.checkpoints import load_checkpoint, save_checkpoint
from segpc_nb.config import RunOptions, TrainConfig
from segpc_nb.hardware import resolve_precision
from segpc_nb.losses import dice_loss, segmentation_loss
from segpc_nb.models import build_network, load_network
from segpc_nb.presets import load_preset
from segpc_nb.progress import epochs_since_best
from segpc_nb.synthetic import make_dataset
from segpc_nb.training import fit, learning_rate


class Blobs(Dataset):
    "Random pictures with a bright square, as network input and target."

    def __init__(self, count, channels, size):
        self.count, self.channels, self.size = count, channels, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        target = np.zeros((1, *self.size), np.float32)
        top, left = (rng.integers(0, side // 2) for side in self.size)
        target[:, top : top + self.size[0] // 3, left : left + self.size[1] // 3] = 1
        image = rng.random((self.channels, *self.size)).astype(np.float32) * 0.5 + 0.5 * target
        return torch.from_numpy(image), torch.from_numpy(target)


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))


TINY = TrainConfig(network={}, size=(16, 16), epochs=4, batch_size=4, lr=1e-2)


def test_cross_entropy_and_dice_equal_independent_implementations():
    generator = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(3, 1, 8, 8, generator=generator),
        (torch.rand(3, 1, 8, 8, generator=generator) > 0.5).float(),
    )
    probability = logits.sigmoid().double().numpy()
    truth = target.double().numpy()
    by_hand = -(truth * np.log(probability) + (1 - truth) * np.log(1 - probability)).mean()
    assert segmentation_loss("cross-entropy")(logits, target).item() == pytest.approx(by_hand, abs=1e-6)
    theirs = smp.losses.DiceLoss("multilabel", smooth=0.5)(logits, target)  # its smooth counts twice
    assert dice_loss(logits, target).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_class_maps_use_the_usual_cross_entropy():
    logits = torch.zeros(2, 3, 4, 4)
    target = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert segmentation_loss("cross-entropy")(logits, target).item() == pytest.approx(np.log(3), abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_plateau_equals_torch(schedule):
    config = replace(TINY, schedule=schedule, lr=1.0)
    losses = np.random.default_rng(0).random(60).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=6, threshold=0)
    for epoch in range(60):
        theirs.step(losses[epoch])
        expected = optimizer.param_groups[0]["lr"] if schedule == "plateau" else 1.0
        got = learning_rate(config, 0.5, losses[: epoch + 1])
        assert expected < 1e-6 or got == pytest.approx(expected, rel=1e-6)  # torch stops changing tiny steps


def test_early_stopping_and_best_weights(tmp_path):
    history = fit(
        tiny(), Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), replace(TINY, epochs=30, lr=1e-9, patience=3), tmp_path
    )
    assert len(history) < 30
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["epoch"] == history.valid_iou.idxmax()
    assert epochs_since_best(history.to_dict("records")) == 3


def test_finished_run_is_not_trained_again(tmp_path):
    first, second = tiny(), tiny()
    fit(first, Blobs(8, 3, (16, 16)), None, TINY, tmp_path)
    before = (tmp_path / "latest.pt").stat().st_mtime_ns
    history = fit(second, Blobs(8, 3, (16, 16)), None, TINY, tmp_path)
    assert len(history) == 4 and (tmp_path / "latest.pt").stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


SCRIPT = """
import io, os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import CONFIGS, Blobs, RunOptions, fit, with_dropout
import torch

folder, config, slow = Path(sys.argv[1]), CONFIGS[sys.argv[2]], float(sys.argv[3])
real_save = torch.save

def slow_save(state, file):  # a kill can fall between the two halves of a file
    buffer = io.BytesIO()
    real_save(state, buffer)
    content = buffer.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    time.sleep(slow)
    file.write(content[len(content) // 2 :])

class Slow(Blobs):
    def __getitem__(self, index):
        time.sleep(slow / 20)
        return super().__getitem__(index)

real_step = torch.optim.AdamW.step

def loud_step(self, *arguments, **settings):
    real_step(self, *arguments, **settings)
    os.write(1, b"step\\n")  # in one piece, whoever else writes

torch.save, torch.optim.AdamW.step = slow_save, loud_step
print("started", os.environ.get("RANK", "0"), os.getpid(), flush=True)
try:
    options = RunOptions(workers=int(sys.argv[4]))
    fit(with_dropout(), Slow(24, 3, (16, 16)), Blobs(4, 3, (16, 16)), config, folder, options=options)
except KeyboardInterrupt:
    sys.exit(130)
"""


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 1, 1)
    )


CONFIGS = {
    "long": replace(TINY, ema_decay=0.5, schedule="plateau", epochs=40),
    "dropout": replace(TINY, ema_decay=0.5, schedule="cosine"),
    "accumulated": replace(TINY, batch_size=2, accumulate=2, clip_norm=1.0, loss="focal+dice"),
    "two processes": replace(TINY, batch_size=4, epochs=3),
    "one process": replace(TINY, batch_size=8, epochs=3),
}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    return path


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ON_CPU = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def finish(script, folder, name, *launcher, workers=0):
    "A fast run, from where the folder stands to the end."
    subprocess.run(
        [sys.executable, *launcher, script, folder, name, "0", str(workers)],
        check=True,
        env=ON_CPU,
        stdout=subprocess.DEVNULL,
    )


def begin(script, folder, name, *launcher, workers=0):
    "A slow run in processes of its own, at the moment its training starts, and the process of its last rank."
    words = [sys.executable, *launcher, script, folder, name, "0.4", str(workers)]
    run = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ON_CPU, start_new_session=True
    )
    ranks = dict(run.stdout.readline().split()[1:] for _ in range(2 if launcher else 1))
    return run, int(ranks[max(ranks)])


def steps_before(run, count):
    "Wait until a run has made some optimiser steps; an epoch has six, or three of two processes that both count."
    for _ in range(count):
        assert run.stdout.readline() == "step\n"


def same_state(a, b):
    "Whether two runs ended with the same bits: weights, moments, average, history but for its times."
    a, b = (load_checkpoint(folder / "latest.pt") for folder in (a, b))
    histories = [
        [{name: value for name, value in row.items() if "seconds" not in name} for row in state["progress"]["history"]]
        for state in (a, b)
    ]
    moments = [
        [value for moment in state["optimizer"]["state"].values() for value in moment.values()] for state in (a, b)
    ]
    tensors = [
        [*state["network"].values(), *state.get("average", {}).values(), *values]
        for state, values in zip((a, b), moments)
    ]
    return histories[0] == histories[1] and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize(
    ("name", "number", "workers"), [("dropout", signal.SIGTERM, 2), ("accumulated", signal.SIGINT, 0)]
)
def test_a_stopped_run_saves_in_the_middle_of_an_epoch_and_resumes_to_the_same_bits(
    name, number, workers, script, tmp_path
):
    finish(script, tmp_path / "whole", name)
    stopped, _ = begin(script, tmp_path / "stopped", name, workers=workers)
    steps_before(stopped, 8)
    os.killpg(stopped.pid, number)  # as a terminal or a scheduler does it: the loading processes are meant, too
    assert stopped.wait() == 128 + number  # as a shell reports it
    progress = load_checkpoint(tmp_path / "stopped" / "latest.pt")["progress"]
    assert len(progress["history"]) < 4 and progress["step"] > 0
    finish(script, tmp_path / "stopped", name)
    assert same_state(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_run_killed_ten_times_resumes_to_the_same_bits(script, tmp_path):
    finish(script, tmp_path / "whole", "long")
    rng, epochs = np.random.default_rng(0), 0
    for _ in range(10):
        run, _ = begin(script, tmp_path / "killed", "long")
        time.sleep(rng.uniform(0, 3.5))  # an epoch takes half a second, its two files 0.8
        assert run.poll() is None, "finished before ten kills"
        run.kill()
        run.wait()
        latest = tmp_path / "killed" / "latest.pt"
        found = len(load_checkpoint(latest)["progress"]["history"]) if latest.exists() else 0
        assert found >= epochs  # nothing that was saved is lost
        epochs = found
    assert 0 < epochs < CONFIGS["long"].epochs
    finish(script, tmp_path / "killed", "long")
    assert same_state(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_and_saves_both(script, tmp_path):
    finish(script, tmp_path / "whole", "two processes", *TORCHRUN)
    stopped, last = begin(script, tmp_path / "stopped", "two processes", *TORCHRUN)
    steps_before(stopped, 8)
    os.kill(last, signal.SIGTERM)
    assert stopped.wait(timeout=60) != 0
    assert load_checkpoint(tmp_path / "stopped" / "latest.pt")["progress"]["step"] > 0
    finish(script, tmp_path / "stopped", "two processes", *TORCHRUN)
    assert same_state(tmp_path / "whole", tmp_path / "stopped")


def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    """Without dropout, augmentation and running statistics, which each process has for itself."""
    path = tmp_path / "train.py"
    path.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_training import CONFIGS, Blobs, fit
        import torch
        from torch import nn
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        fit(network, Blobs(24, 3, (16, 16)), Blobs(5, 3, (16, 16)), CONFIGS[sys.argv[2]], Path(sys.argv[1]))
        """),
        encoding="utf-8",
    )
    subprocess.run(
        [sys.executable, *TORCHRUN, path, tmp_path / "two", "two processes"],
        check=True,
        capture_output=True,
        env=ON_CPU,
    )
    subprocess.run([sys.executable, path, tmp_path / "one", "one process"], check=True, capture_output=True, env=ON_CPU)
    two, one = (pd.read_csv(tmp_path / name / "history.csv") for name in ("two", "one"))
    for column in ("train_loss", "valid_loss", "valid_iou"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-5)
    weights = [load_checkpoint(tmp_path / name / "best.pt")["network"] for name in ("two", "one")]
    for a, b in zip(*(state.values() for state in weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Noisy(Blobs):
    "Another picture each time."

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image + torch.rand(image.shape), target


def test_workers_change_nothing(tmp_path):
    networks = [tiny(), tiny()]
    for workers, network in zip((0, 2), networks):
        fit(network, Noisy(8, 3, (16, 16)), None, TINY, tmp_path / str(workers), options=RunOptions(workers=workers))
    assert all(torch.equal(a, b) for a, b in zip(*(network.state_dict().values() for network in networks)))


class Broken(Blobs):
    "No numbers in the second epoch of a run."

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image * float("nan"), target


def test_a_loss_that_is_no_number_is_refused_and_the_checkpoint_kept(tmp_path):
    fit(tiny(), Blobs(8, 3, (16, 16)), None, replace(TINY, epochs=1), tmp_path)
    longer = replace(TINY, epochs=2)
    save_checkpoint(
        tmp_path / "latest.pt", load_checkpoint(tmp_path / "latest.pt") | {"config": json.dumps(asdict(longer))}
    )
    before = (tmp_path / "latest.pt").read_bytes()
    with pytest.raises(ValueError, match=r"the loss of epoch 1 is nan.*clip_norm"):
        fit(tiny(), Broken(8, 3, (16, 16)), None, longer, tmp_path)
    assert (tmp_path / "latest.pt").read_bytes() == before


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "latest.pt", {"epoch": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"latest.pt: not written .*No space left on device.*; the checkpoint before it is kept"
    ):
        save_checkpoint(tmp_path / "latest.pt", {"epoch": 2})
    assert load_checkpoint(tmp_path / "latest.pt") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


def test_other_data_are_refused(tmp_path):
    fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path, data="a")
    with pytest.raises(ValueError, match=r"holds another run .data: 'a' there, 'b' now"):
        fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path, data="b")


def test_a_missing_tracker_is_named(tmp_path):
    with pytest.raises(ValueError, match="comet_ml is not installed"):
        fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path, options=RunOptions(log_with=("comet_ml",)))


def test_resume_never_starts_over_and_nonsense_is_refused(tmp_path):
    first = fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path)
    again = fit(
        tiny(), Blobs(8, 3, (16, 16)), None, replace(TINY, lr=1e-3), tmp_path, options=RunOptions(resume="never")
    )
    assert len(first) == len(again) == 4 and first.train_loss.iloc[-1] != again.train_loss.iloc[-1]
    with pytest.raises(ValueError, match="resume = 'yes', allowed: 'auto', 'never'"):
        fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path, options=RunOptions(resume="yes"))


def test_bf16_and_back_in_one_session(tmp_path):
    half = fit(tiny(), Blobs(8, 3, (16, 16)), None, replace(TINY, mixed_precision="bf16"), tmp_path / "half")
    full = fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, tmp_path / "full")
    assert half.train_loss.iloc[0] == pytest.approx(full.train_loss.iloc[0], rel=0.02) and not np.array_equal(
        half.train_loss, full.train_loss
    )


def test_tensorboard_gets_the_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fit(
        tiny(),
        Blobs(8, 3, (16, 16)),
        Blobs(4, 3, (16, 16)),
        TINY,
        tmp_path,
        options=RunOptions(log_with=("tensorboard",)),
    )
    logged = {}
    for events in tmp_path.rglob("events.out*"):  # one file for the configuration, one for the numbers
        found = reader.EventAccumulator(str(events))
        found.Reload()
        logged |= {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    for column in ("train_loss", "valid_loss", "valid_iou"):
        assert logged[column] == pytest.approx(history[column].tolist(), rel=1e-6)


def test_mlflow_gets_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")  # not among the pinned packages, with which it does not go together
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    history = fit(
        tiny(), Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), TINY, tmp_path, options=RunOptions(log_with=("mlflow",))
    )
    with closing(sqlite3.connect(tmp_path / "runs.db")) as database:
        for column in ("train_loss", "valid_loss", "valid_iou"):
            logged = database.execute("select value from metrics where key = ? order by step", (column,)).fetchall()
            assert [value for (value,) in logged] == pytest.approx(history[column].tolist(), rel=1e-6)
        assert ("lr", "0.01") in database.execute("select key, value from params").fetchall()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_the_same_within_rounding(tmp_path):
    networks = tiny(), tiny()
    plain = fit(networks[0], Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), TINY, tmp_path / "plain")
    compiled = fit(
        networks[1], Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), replace(TINY, compiled=True), tmp_path / "compiled"
    )
    assert compiled.train_loss.tolist() == pytest.approx(plain.train_loss.tolist(), abs=1e-4)
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    again = fit(
        tiny(), Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), replace(TINY, compiled=True), tmp_path / "compiled"
    )  # is finished: only read
    assert again.train_loss.tolist() == compiled.train_loss.tolist()


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "bf16"), ({"avx2": True}, "no")],
)
def test_precision_follows_the_processor(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_precision("auto") == expected
    assert resolve_precision("bf16") == "bf16"


def test_region_augmentation_moves_image_and_masks_together():
    from torchvision import tv_tensors

    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, 10:22, 14:30] = 255
    mask = (image[:1] > 0).to(torch.uint8).repeat(2, 1, 1)
    torch.manual_seed(0)
    for _ in range(10):
        moved, masks = region_augmentation(40)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        bright = moved.float().mean(0) > 60
        shared = (bright & (masks[0] > 0)).sum() / (bright | (masks[0] > 0)).sum()
        assert shared > 0.85 and torch.equal(masks[0], masks[1])


def two_steps(config, channels, batch_size, tmp_path):
    "Two optimiser steps with the preset's network, size and step size."
    network = build_network(**config.network)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    history = fit(
        network,
        Blobs(2 * batch_size, channels, config.size),
        None,
        replace(config, batch_size=batch_size, epochs=1),
        tmp_path,
    )
    assert np.isfinite(history.train_loss).all()
    changed = [name for name, tensor in network.named_parameters() if not torch.equal(tensor.cpu(), before[name])]
    assert len(changed) > 0.9 * len(before)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_two_steps_of_the_paper_preset_cytoplasm(scale, tmp_path):
    two_steps(
        load_preset("paper").cytoplasm[scale], 4, 2, tmp_path
    )  # batch normalisation of the pooled branch needs two


@pytest.mark.slow
def test_two_steps_of_the_paper_preset_nucleus(tmp_path):
    two_steps(load_preset("paper").nucleus, 3, 1, tmp_path)


def test_two_steps_of_the_paper_networks_on_small_inputs(tmp_path):
    two_steps(replace(load_preset("paper").nucleus, size=(64, 64)), 3, 1, tmp_path / "nucleus")
    two_steps(replace(load_preset("paper").cytoplasm[0.5], size=(64, 64)), 4, 2, tmp_path / "cytoplasm")


TWO_STAGES = """
name: tiny
nucleus: {network: {name: unet, widths: [4, 8]}, size: [96, 128], epochs: 1, lr: 1e-3}
cytoplasm:
  1.75: {network: {name: unet, widths: [4, 8], in_channels: 4}, size: [32, 32], epochs: 1, lr: 1e-3}
nuclei: jittered
bundle: {nucleus_threshold: 0.4}
"""


def test_the_command_on_two_processes_trains_as_on_one(tmp_path):
    make_dataset(tmp_path / "smears", pictures=14, seed=1)
    (tmp_path / "tiny.yaml").write_text(TWO_STAGES, encoding="utf-8")
    segpc = [Path(sys.executable).with_name("segpc"), "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    for out, launcher, batch in (("one", [sys.executable], "4"), ("two", [sys.executable, *TORCHRUN], "2")):
        for stage in ("nucleus", "cytoplasm"):
            words = [*launcher, *segpc, stage, "--preset", "tiny.yaml", "--data", "smears", "--out", out]
            words += ["--train.batch_size", batch]  # of each process
            subprocess.run(words, check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    for part in ("nucleus/main", "cytoplasm_1.75"):
        machines, histories, weights = [], [], []
        for out in ("one", "two"):
            folder = tmp_path / out / part
            machines.append(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["machine"]["processes"])
            histories.append(pd.read_csv(folder / "history.csv"))
            weights.append(load_network(folder / "weights").state_dict())
        assert machines == [1, 2]
        assert np.allclose(
            histories[0][["train_loss", "valid_loss"]], histories[1][["train_loss", "valid_loss"]], atol=1e-4
        )
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])
    ends = [{path.name for path in (tmp_path / out / "nucleus/nuclei").iterdir()} for out in ("one", "two")]
    assert ends[0] == ends[1]
