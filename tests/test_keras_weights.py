"""The authors' weight files: every layout, every rule against NumPy, refusals, and parity with their own networks."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from golden.keras_file import write_keras_file
from safetensors.torch import load_file
from torch import nn

from segpc_nb.keras_weights import (
    KERAS_NETWORKS,
    KerasLayer,
    convert_keras_file,
    convert_layer,
    fill_from_keras,
    keras_rules,
    keras_shapes,
    read_keras,
    unet_order,
)
from segpc_nb.models import AttentionDeepLabV3Plus, UNet, load_network

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def names(values, text=False):
    if not values:
        return np.zeros(0)
    return np.array(values, dtype=h5py.string_dtype()) if text else np.array([value.encode() for value in values])


def write(group, arrays, suffix=":0", text=False):
    "Layers {name: {path of a tensor: array}} into a group, as Keras does."
    group.attrs["layer_names"] = names(list(arrays), text)
    for name, tensors in arrays.items():
        sub = group.create_group(name)
        sub.attrs["weight_names"] = names([path + suffix for path in tensors], text)
        for path, array in tensors.items():
            sub[path + suffix] = array


def random_layers(rng, network, order, name="conv2d_{}"):
    "Random tensors for every layer of a network, in Keras' shapes."
    return {
        name.format(i + 1): {
            tensor: rng.normal(0, 0.2, shape).astype(np.float32)
            for tensor, shape in keras_shapes(network.get_submodule(key))
        }
        for i, key in enumerate(order)
    }


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", (False, True))
@pytest.mark.parametrize("suffix", (":0", ""))
@pytest.mark.parametrize("text", (False, True))
def test_every_layout_reads_the_same(tmp_path, rng, full, suffix, text):
    arrays = {
        "zeta": {"zeta/kernel": rng.normal(size=(1, 1, 2, 3)), "zeta/bias": rng.normal(size=3)},
        "relu": {},
        "alpha": {"alpha_1/depthwise_kernel": rng.normal(size=(3, 3, 3, 1))},
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file.create_group("model_weights") if full else file, arrays, suffix, text)
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
        file.create_group("optimizer_weights").attrs["weight_names"] = names(["Adam/iterations:0"])
    layers = read_keras(tmp_path / "a.h5")
    assert [layer.name for layer in layers] == ["zeta", "alpha"]
    assert [list(layer.tensors) for layer in layers] == [["kernel", "bias"], ["kernel"]]
    np.testing.assert_array_equal(layers[0].tensors["kernel"], arrays["zeta"]["zeta/kernel"].astype(np.float32))


def test_long_lists_in_pieces(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        arrays = {f"layer_{i}": {f"layer_{i}/bias": np.full(1, i)} for i in range(12)}
        write(file, arrays)
        del file.attrs["layer_names"]
        for piece in range(3):
            file.attrs[f"layer_names{piece}"] = names(list(arrays)[4 * piece : 4 * piece + 4])
    assert [layer.tensors["bias"][0] for layer in read_keras(tmp_path / "a.h5")] == list(range(12))


def test_a_model_inside_a_layer_lists_statistics_last(tmp_path):
    inner = {
        "conv_9/kernel": np.zeros((1, 1, 1, 2)),
        "bn_3/gamma": np.ones(2),
        "bn_3/beta": np.ones(2),
        "conv_2/kernel": np.zeros((1, 1, 2, 1)),
        "bn_3/moving_mean": np.ones(2),
        "bn_3/moving_variance": np.ones(2),
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file, {"input_1": {}, "model_1": inner})
    layers = read_keras(tmp_path / "a.h5")
    assert [layer.name for layer in layers] == ["conv_9", "bn_3", "conv_2"]
    assert list(layers[1].tensors) == ["gamma", "beta", "moving_mean", "moving_variance"]


def test_what_is_no_keras_file(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    with h5py.File(tmp_path / "torn.h5", "w") as file:
        file.attrs["layer_names"] = names(["gone"])
    with pytest.raises(ValueError, match=r"missing\.h5: no such file"):
        read_keras(tmp_path / "missing.h5")
    for name in ("text.h5", "torn.h5"):
        with pytest.raises(ValueError, match=f"{name}: can't be read as HDF5 weights of Keras"):
            read_keras(tmp_path / name)
    with h5py.File(tmp_path / "words.h5", "w") as file:
        write(file, {"conv": {"conv/kernel": np.array([b"word"])}})
    whole = (tmp_path / "words.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    for name in ("words.h5", "half.h5"):
        with pytest.raises(ValueError, match=f"{name}: can't be read as HDF5 weights of Keras"):
            read_keras(tmp_path / name)
    for name, options in {"virtual": {}, "huge": {"shape": (10**10,), "chunks": (10**6,)}}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            write(file, {"conv": {"conv/kernel": np.ones(3)}})
            del file["conv/conv/kernel:0"]
            if options:
                file.create_dataset("conv/conv/kernel:0", dtype=np.float32, **options)
            else:
                file["conv/conv/kernel:0"] = h5py.ExternalLink("words.h5", "conv/conv/kernel:0")
        with pytest.raises(ValueError, match=r"in another file|has 10,000,000,000 numbers"):
            read_keras(tmp_path / f"{name}.h5")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(ValueError, match=r"the file ends after 0 layers.*some other network"):
        convert_keras_file(tmp_path / "empty.h5", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- every rule against a convolution written out in NumPy ------------------------------------------------------------


def convolve(image, kernel, depthwise=False):
    "Valid cross-correlation of (h, w, in) with (kh, kw, in, out), as TensorFlow defines it."
    kh, kw = kernel.shape[:2]
    out = np.zeros((image.shape[0] - kh + 1, image.shape[1] - kw + 1, kernel.shape[2 if depthwise else 3]))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            window = image[row : row + kh, column : column + kw]
            out[row, column] = (
                np.einsum("hwc,hwc->c", window, kernel[..., 0])
                if depthwise
                else np.einsum("hwi,hwio->o", window, kernel)
            )
    return out


def run(module, tensors, inputs):
    module.load_state_dict(convert_layer(KerasLayer("it", tensors), module), strict=False)
    with torch.inference_mode():
        return module.eval()(torch.from_numpy(inputs.astype(np.float32))).numpy()


def float32(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_convolution(rng):
    image, kernel, bias = float32(rng, 6, 5, 2), float32(rng, 3, 2, 2, 4), float32(rng, 4)
    ours = run(nn.Conv2d(2, 4, (3, 2)), {"kernel": kernel, "bias": bias}, image.transpose(2, 0, 1)[None])
    np.testing.assert_allclose(ours[0].transpose(1, 2, 0), convolve(image, kernel) + bias, atol=1e-5)


def test_depthwise_convolution(rng):
    image, kernel = float32(rng, 6, 5, 3), float32(rng, 3, 2, 3, 1)
    ours = run(nn.Conv2d(3, 3, (3, 2), groups=3, bias=False), {"kernel": kernel}, image.transpose(2, 0, 1)[None])
    np.testing.assert_allclose(ours[0].transpose(1, 2, 0), convolve(image, kernel, depthwise=True), atol=1e-5)


def test_dense(rng):
    kernel, inputs = float32(rng, 3, 5), float32(rng, 2, 3)
    np.testing.assert_allclose(run(nn.Linear(3, 5, bias=False), {"kernel": kernel}, inputs), inputs @ kernel, atol=1e-5)


def test_convolution_across_branches(rng):
    stack, kernel = float32(rng, 4, 3, 5, 2), float32(rng, 1, 1, 5, 2, 6)  # h, w, branch, channel
    ours = run(nn.Conv3d(2, 6, (5, 1, 1), bias=False), {"kernel": kernel}, stack.transpose(3, 2, 0, 1)[None])
    np.testing.assert_allclose(
        ours[0, :, 0].transpose(1, 2, 0), np.einsum("hwsi,sio->hwo", stack, kernel[0, 0]), atol=1e-5
    )


def test_batch_normalisation(rng):
    gamma, beta, mean, variance = (
        float32(rng, 3),
        float32(rng, 3),
        float32(rng, 3),
        rng.uniform(0.5, 2, 3).astype(np.float32),
    )
    maps = float32(rng, 4, 4, 3)
    tensors = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance}
    ours = run(nn.BatchNorm2d(3, eps=1e-3), tensors, maps.transpose(2, 0, 1)[None])
    np.testing.assert_allclose(
        ours[0].transpose(1, 2, 0), gamma * (maps - mean) / np.sqrt(variance + 1e-3) + beta, atol=1e-5
    )


@pytest.mark.parametrize(
    "module",
    (
        nn.Conv2d(2, 4, (3, 2)),
        nn.Conv2d(3, 3, 3, groups=3, bias=False),
        nn.Linear(3, 5, bias=False),
        nn.Conv3d(2, 6, (5, 1, 1), bias=False),
        nn.BatchNorm2d(4),
    ),
)
def test_shapes_agree_with_the_rules(module, rng):
    tensors = {name: rng.normal(size=shape) for name, shape in keras_shapes(module)}
    for ours, tensor in convert_layer(KerasLayer("it", tensors), module).items():
        assert tensor.shape == getattr(module, ours).shape
    assert len(tensors) == len(keras_rules(module))


# -- whole networks ---------------------------------------------------------------------------------------------------


def unet_in_numpy(arrays, image):
    "The authors' U-Net written once more, in Keras' layout, for two resolutions."
    kernels = iter(arrays.values())

    def conv(maps):
        layer = next(kernels)
        size = layer["kernel"].shape[0]
        before, after = ((size - 1) // 2, size // 2)
        return convolve(np.pad(maps, ((before, after), (before, after), (0, 0))), layer["kernel"]) + layer["bias"]

    def twice(maps):
        return np.maximum(conv(np.maximum(conv(maps), 0)), 0)

    skips = []
    for level in range(3):
        if level:
            h, w, c = image.shape
            image = image.reshape(h // 2, 2, w // 2, 2, c).max((1, 3))
        image = twice(image)
        skips.append(image)
    skips.pop()
    for _ in range(2):
        up = np.maximum(conv(image.repeat(2, 0).repeat(2, 1)), 0)
        image = twice(np.concatenate([skips.pop(), up], -1))
    image = np.maximum(conv(image), 0)
    return 1 / (1 + np.exp(-conv(image)))


def test_a_small_unet_answers_as_the_same_network_in_numpy(tmp_path, rng):
    network = UNet(widths=(3, 4), activation="sigmoid").eval()
    order = unet_order(network)
    arrays = random_layers(rng, network, order)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(
            file,
            {
                name: {f"{name}/{tensor}": array for tensor, array in tensors.items()}
                for name, tensors in arrays.items()
            },
        )
    fill_from_keras(network, order, read_keras(tmp_path / "a.h5"))
    image = rng.uniform(size=(8, 12, 3)).astype(np.float32)
    with torch.inference_mode():
        ours = network(torch.from_numpy(image).permute(2, 0, 1)[None])
    np.testing.assert_allclose(ours[0].permute(1, 2, 0).numpy(), unet_in_numpy(arrays, image), atol=1e-5)


@pytest.fixture(scope="module")
def deeplab():
    settings, order = KERAS_NETWORKS["Attention DeepLabv3+"]
    with torch.device("meta"):
        network = AttentionDeepLabV3Plus(**{key: value for key, value in settings.items() if key != "name"})
    return network, order(network)


def test_deeplab_order_holds_every_tensor_once(deeplab):
    network, order = deeplab
    tensors = [f"{name}.{ours}" for name in order for ours, _ in keras_rules(network.get_submodule(name)).values()]
    assert sorted(tensors) == sorted(name for name in network.state_dict() if not name.endswith("num_batches_tracked"))
    assert len(tensors) == 786 and sum(network.state_dict()[name].numel() for name in tensors) == 57_451_233


def test_refusals_name_layer_shapes_and_likeness(tmp_path, deeplab, rng):
    network, order = deeplab
    arrays = {
        f"layer_{i}": {
            f"layer_{i}/{tensor}": np.broadcast_to(np.float32(0), shape)
            for tensor, shape in keras_shapes(network.get_submodule(name))
        }
        for i, name in enumerate(order)
    }

    def message(changed):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            write(file, changed)
        with pytest.raises(ValueError) as error:
            convert_keras_file(tmp_path / "a.h5", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    small = {f"layer_{i}": tensors for i, tensors in enumerate(arrays.values()) if i < 3}
    small = {
        name: {path.replace(path.split("/")[0], name): array for path, array in tensors.items()}
        for name, tensors in small.items()
    }
    text = message(small)
    assert "the file ends after 3 layers with weights" in text and "some other network" in text
    text = message({"fc": {"fc/kernel": np.zeros((7, 3), np.float32)}})
    assert "layer 1 ('fc') holds {'kernel': (7, 3)}" in text and "some other network" in text


def test_numbers_that_are_not_finite(rng):
    network = UNet(widths=(2, 2))
    order = unet_order(network)
    layers = [KerasLayer(name, tensors) for name, tensors in random_layers(rng, network, order).items()]
    layers[3].tensors["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="'conv2d_4' holds numbers that are not finite"):
        fill_from_keras(network, order, layers)


# -- parity with the authors' own networks, see golden/README.md ------------------------------------------------------
# golden/cyt.npz and golden/unet.npz are from the authors' networks, unmodified, under Keras 2.2.0, TensorFlow 1.13.1:
# one input per size and every fifth pixel of the output, for weights that golden/keras_file.py draws again from seeds.


def convert_reference(net, folder, naming="plain", full=False):
    "The network with the reference weights, converted from a file as Keras writes it."
    write_keras_file(folder / "it.hdf5", net, naming, full)
    name = convert_keras_file(folder / "it.hdf5", folder / "it")
    (folder / "it.hdf5").unlink()
    return name


def predict_reference(network, net, size):
    "What a network says about a reference input, and what the originals said, every fifth pixel of both."
    golden = np.load(GOLDEN / f"{net}.npz")
    image = golden[f"x_{size}"].astype(np.float64)
    image[..., :3] /= 255
    images = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)[None])
    with torch.inference_mode():
        return network(images.to(next(network.parameters()).dtype))[0, 0, ::5, ::5].numpy(), golden


def difference(network, net, size):
    ours, golden = predict_reference(network, net, size)
    return np.abs(ours - golden[f"y_{size}"])


@pytest.mark.parametrize(("naming", "full"), (("plain", False), ("zero", True)))
def test_unet_answers_as_the_original(tmp_path, naming, full):
    assert convert_reference("unet", tmp_path, naming, full) == "U-Net"
    network = load_network(tmp_path / "it")
    assert difference(network, "unet", 256).max() < 5e-5
    network.save_pretrained(tmp_path / "hub")
    assert difference(UNet.from_pretrained(tmp_path / "hub").eval(), "unet", 256).max() < 5e-5


def test_deeplab_answers_as_the_original_at_both_sizes(tmp_path):
    assert convert_reference("cyt", tmp_path, "offset") == "Attention DeepLabv3+"
    network = load_network(tmp_path / "it")
    for size in (256, 384):
        wrong = difference(network, "cyt", size)
        assert wrong.max() < 3e-4 and wrong.mean() < 3e-5
    network.save_pretrained(tmp_path / "hub")
    again = AttentionDeepLabV3Plus.from_pretrained(tmp_path / "hub").eval()
    assert difference(again, "cyt", 256).max() < 3e-4


@pytest.mark.slow
@pytest.mark.parametrize(("naming", "full"), (("plain", False), ("zero", False), ("plain", True), ("offset", True)))
def test_every_naming_gives_the_same_tensors(tmp_path, naming, full):
    for folder, chosen in ((tmp_path / "a", ("offset", False)), (tmp_path / "b", (naming, full))):
        folder.mkdir()
        convert_reference("cyt", folder, *chosen)
    a, b = (load_file(tmp_path / name / "it" / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("net", ("unet", pytest.param("cyt", marks=pytest.mark.slow)))
def test_double_precision_equals_the_original_in_double_precision(tmp_path, net):
    convert_reference(net, tmp_path)
    ours, golden = predict_reference(load_network(tmp_path / "it").double(), net, 256)
    assert np.abs(ours - golden["exact_256"]).max() < 1e-8
