"""Networks: shapes, gradients, what they refuse, and the way to the disk and back."""

import json
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from segpc_nb.layers import BranchAttention
from segpc_nb.models import AttentionDeepLabV3Plus, UNet, build_network, load_network, save_network

SMALL = {
    "unet": {"name": "unet", "widths": (4, 8)},
    "deeplab": {
        "name": "attention-deeplabv3plus",
        "encoder_name": "tu-mobilenetv3_small_050",
        "decoder_channels": 8,
        "atrous_rates": (1, 2, 3),
    },
    "paper-head": {
        "name": "attention-deeplabv3plus",
        "encoder_name": "tu-mobilenetv3_small_050",
        "decoder_channels": 8,
        "paper_head": True,
    },
    "smp-unet": {"name": "smp-unet", "encoder_name": "tu-mobilenetv3_small_050", "decoder_channels": (16, 8, 8, 8, 8)},
}


def channels(network):
    return 4 if isinstance(network, AttentionDeepLabV3Plus) else 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SMALL)
def network(request):
    return build_network(**SMALL[request.param])


def predict(network, images):
    with torch.inference_mode():
        return network.eval()(images)


def test_every_parameter_learns(network):
    network.train()
    images = torch.rand(4, channels(network), 64, 64)
    with torch.no_grad():  # the two channels of the authors' head may be dead at the start
        for parameter in network.parameters():
            parameter.abs_() if parameter.ndim == 1 else None
    F.binary_cross_entropy_with_logits(network(images), (torch.rand(4, 1, 64, 64) > 0.5).float()).backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []


def test_crops_do_not_see_each_other(network):
    images = torch.rand(3, channels(network), 64, 96)
    together = predict(network, images)
    assert together.shape == (3, 1, 64, 96)
    torch.testing.assert_close(together[1:2], predict(network, images[1:2]), rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_any_multiple_of_sixteen(rows, columns):
    size = 16 * rows, 16 * columns
    for name in ("deeplab", "paper-head"):
        assert predict(build_network(**SMALL[name]), torch.zeros(1, 4, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("size", ((100, 96), (96, 8), (17, 17)))
def test_other_sizes_are_refused_with_the_nearest_allowed(size):
    with pytest.raises(
        ValueError, match=f"input of {size[0]}x{size[1]} px; both sides must be multiples of 16, resize to"
    ):
        build_network(**SMALL["deeplab"])(torch.zeros(1, 4, *size))


@pytest.mark.parametrize("name", SMALL)
def test_probabilities_are_the_sigmoid_of_the_logits(name, tmp_path):
    network = build_network(**SMALL[name], activation="sigmoid")
    images = torch.rand(2, channels(network), 64, 64)
    save_network(network, tmp_path)
    probability, logits = predict(load_network(tmp_path), images), predict(load_network(tmp_path, logits=True), images)
    assert 0 <= probability.min() and probability.max() <= 1
    torch.testing.assert_close(logits.sigmoid(), probability, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predict(network, images), probability)


def test_paper_head_survives_saturation():
    network = build_network(**SMALL["paper-head"])
    network.segmentation_head[-1].bias.data[:] = 40.0
    logits = predict(network, torch.rand(1, 4, 32, 32))
    assert torch.isfinite(logits).all() and logits.min() > 16


def test_order_of_branches_matters_in_the_mix():
    mix, branches = BranchAttention(3), list(torch.rand(5, 2, 3, 4, 4))
    assert not torch.allclose(mix(branches), mix(branches[::-1]))


def test_round_trip(network, tmp_path):
    network.train()(torch.rand(4, channels(network), 64, 64))  # moves the statistics
    images = torch.rand(1, channels(network), 64, 64)
    save_network(network, tmp_path / "a" / "b")
    again = load_network(tmp_path / "a" / "b")
    assert not again.training and type(again) is type(network)
    assert torch.equal(predict(again, images), predict(network, images))
    save_network(again, tmp_path / "c")
    assert load_file(tmp_path / "c" / "model.safetensors").keys() == network.state_dict().keys()


def test_half_is_half_the_size_and_nearly_the_same(tmp_path):
    network, images = build_network(**SMALL["deeplab"]), torch.rand(1, 4, 64, 64)
    for half in (False, True):
        save_network(network, tmp_path / str(half), half=half)
    sizes = [(tmp_path / str(half) / "model.safetensors").stat().st_size for half in (False, True)]
    assert sizes[1] < 0.6 * sizes[0]
    torch.testing.assert_close(
        predict(load_network(tmp_path / "True"), images), predict(network, images), rtol=0.05, atol=0.02
    )


@pytest.mark.parametrize("name", ("unet", "deeplab", "paper-head"))
def test_pretrained_form_round_trip(name, tmp_path):
    network = build_network(**SMALL[name], activation="sigmoid")
    images = torch.rand(1, channels(network), 64, 64)
    network.save_pretrained(tmp_path / "hub")
    again = type(network).from_pretrained(tmp_path / "hub").eval()
    assert torch.equal(predict(again, images), predict(network, images))
    save_network(again, tmp_path / "ours")
    assert torch.equal(predict(load_network(tmp_path / "ours"), images), predict(network, images))


def test_loading_never_reaches_for_the_network(tmp_path, monkeypatch):
    from segmentation_models_pytorch.encoders import timm_universal

    create = timm_universal.timm.create_model
    monkeypatch.setattr(
        timm_universal.timm, "create_model", lambda name, **rest: create(name, **rest | {"pretrained": False})
    )
    networks = [build_network(**SMALL[name], encoder_weights="imagenet") for name in ("deeplab", "smp-unet")]
    monkeypatch.undo()

    def refuse(*args, **kwargs):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for i, network in enumerate(networks):
        save_network(network, tmp_path / str(i))
        assert json.loads((tmp_path / str(i) / "config.json").read_text())["network"]["encoder_weights"] is None
        load_network(tmp_path / str(i))
        network.save_pretrained(tmp_path / f"hub{i}")
        assert json.loads((tmp_path / f"hub{i}" / "config.json").read_text())["encoder_weights"] is None
        type(network).from_pretrained(tmp_path / f"hub{i}")


def test_what_loading_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"holds no network.*config\.json"):
        load_network(tmp_path / "nowhere")
    save_network(UNet(widths=(4, 8)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99, this version reads 1; update"):
        load_network(tmp_path)
    config["network"]["widths"] = [4, 16]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not belong together"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no network"):
        load_network(tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_unknown_activation(name):
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        build_network(**SMALL[name], activation="nonsense")
