"""Training: presets, resuming after a kill, losses against independent implementations."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.data import Dataset

from segpc_nb.models import build_network
from segpc_nb.training import PRESETS, TrainConfig, dice_loss, epochs_since_best, fit, learning_rate, load_checkpoint, region_augmentation, segmentation_loss


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
    logits, target = torch.randn(3, 1, 8, 8, generator=generator), (torch.rand(3, 1, 8, 8, generator=generator) > 0.5).float()
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
    history = fit(tiny(), Blobs(8, 3, (16, 16)), Blobs(4, 3, (16, 16)), replace(TINY, epochs=30, lr=1e-9, patience=3), tmp_path)
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


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_training import Blobs, TINY, tiny, fit
        import segpc_nb.training as training
        written = []
        real = training.save_checkpoint
        def save(path, state):
            written.append(path)
            if len(written) == int(sys.argv[2]):
                os.kill(os.getpid(), 9)
            real(path, state)
        training.save_checkpoint = save
        fit(tiny(), Blobs(8, 3, (16, 16)), None, TINY, Path(sys.argv[1]))
        """),
        encoding="utf-8",
    )
    for writes in (3, 4):  # killed before best.pt and before latest.pt of the second epoch
        subprocess.run([sys.executable, script, tmp_path / f"killed_{writes}", str(writes)], check=False)
        assert len(pd.read_csv(tmp_path / f"killed_{writes}" / "history.csv")) < 4
        resumed, whole = tiny(), tiny()
        fit(resumed, Blobs(8, 3, (16, 16)), None, TINY, tmp_path / f"killed_{writes}")
        fit(whole, Blobs(8, 3, (16, 16)), None, TINY, tmp_path / f"whole_{writes}")
        assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


def test_region_augmentation_moves_image_and_masks_together():
    from torchvision import tv_tensors

    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, 10:22, 14:30] = 255
    mask = (image[:1] > 0).to(torch.uint8).repeat(2, 1, 1)
    torch.manual_seed(0)
    for _ in range(10):
        moved, masks = region_augmentation()(tv_tensors.Image(image), tv_tensors.Mask(mask))
        bright = moved.float().mean(0) > 60
        shared = (bright & (masks[0] > 0)).sum() / (bright | (masks[0] > 0)).sum()
        assert shared > 0.85 and torch.equal(masks[0], masks[1])


def two_steps(config, channels, batch_size, tmp_path):
    "Two optimiser steps with the preset's network, size and step size."
    network = build_network(**config.network)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    history = fit(network, Blobs(2 * batch_size, channels, config.size), None, replace(config, batch_size=batch_size, epochs=1), tmp_path)
    assert np.isfinite(history.train_loss).all()
    changed = [name for name, tensor in network.named_parameters() if not torch.equal(tensor.cpu(), before[name])]
    assert len(changed) > 0.9 * len(before)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_two_steps_of_the_paper_preset_cytoplasm(scale, tmp_path):
    two_steps(PRESETS["paper"].cytoplasm[scale], 4, 2, tmp_path)  # batch normalisation of the pooled branch needs two


@pytest.mark.slow
def test_two_steps_of_the_paper_preset_nucleus(tmp_path):
    two_steps(PRESETS["paper"].nucleus, 3, 1, tmp_path)


def test_two_steps_of_the_paper_networks_on_small_inputs(tmp_path):
    two_steps(replace(PRESETS["paper"].nucleus, size=(64, 64)), 3, 1, tmp_path / "nucleus")
    two_steps(replace(PRESETS["paper"].cytoplasm[0.5], size=(64, 64)), 4, 2, tmp_path / "cytoplasm")
