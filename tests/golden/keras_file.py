"""Weights from seeds, written as the HDF5 files that Keras makes; README.md has the recipe."""

import json
import re
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import h5py
import numpy as np

here = Path(__file__).parent


def drawn(kind: str, tensor: str, shape: list[int], seed: str) -> np.ndarray:
    "A tensor that depends on its seed only."
    rng = np.random.RandomState(zlib.crc32(seed.encode()))  # the legacy stream, the same in every version of NumPy
    if tensor == "gamma":
        gamma = rng.uniform(0.5, 1.5, shape)
        return gamma * np.where(rng.uniform(0.0, 1.0, shape) < 0.1, -1.0, 1.0) * (0.4 if kind == "bn_small" else 1.0)
    if tensor in ("beta", "bias"):
        mean, deviation = {"beta": (0.1, 0.3), "bias": (0.02, 0.08)}[tensor]
        return mean + deviation * rng.standard_normal(shape)
    depthwise = tensor == "depthwise_kernel"  # (kh, kw, channels, 1); any other kernel: (..., in, out)
    kernel = rng.standard_normal(shape) * np.sqrt(2.0 / prod(shape[:2] if depthwise else shape[:-1]))
    if kind == "he_scaled":  # one factor per channel, from 0.15 to 1.5
        channels = shape[2] if depthwise else shape[-1]
        kernel = kernel * (0.15 * 10.0 ** rng.uniform(0.0, 1.0, channels)).reshape((-1, 1) if depthwise else -1)
    return kernel


def tensors(net: str) -> Iterator[np.ndarray]:
    "All tensors of `cyt` or `unet`, float32, in the order of the file."
    stored = np.load(here / f"{net}.npz")
    index = at = 0
    for _, kind, weights in json.loads((here / f"{net}_layers.json").read_text())["layers"]:
        for tensor, shape in weights:
            if f"tensor{index}" in stored:
                value = stored[f"tensor{index}"]
            elif tensor in ("moving_mean", "moving_variance"):
                value = stored[tensor][at : at + shape[0]]
                at += shape[0] * (tensor == "moving_variance")
            else:
                value = drawn(kind, tensor, shape, f"{stored['seed']}/{index}")
            yield np.ascontiguousarray(value, np.float32)
            index += 1


def renamed(head: dict, name: str, naming: str) -> tuple[str, str]:
    "A layer's name and the scope of its tensors, in one of the namings of Keras."
    shift, numbered = head["auto_name_offset"], re.fullmatch(r"(.*)_(\d+)", name)
    automatic = numbered is not None and numbered[1] in shift
    if naming == "offset":  # saved in a session that had built other models before
        new = f"{numbered[1]}_{int(numbered[2]) + shift[numbered[1]]}" if automatic else name
        return new, new if automatic or head["fully_auto_named"] else f"{name}_1"
    if naming == "zero" and automatic and numbered[1] != "input":  # Keras 2.15 counts from zero
        name = numbered[1] + (f"_{int(numbered[2]) - 1}" if numbered[2] != "1" else "")
    return name, name


def write_keras_file(
    path: Path,
    net: str,  # cyt or unet
    naming: str = "plain",  # or offset, zero
    full: bool = False,  # a whole model, not only its weights
) -> None:
    "Write the weights as Keras 2.2.0 does, or Keras 2.15 for the naming from zero."
    head, values = json.loads((here / f"{net}_layers.json").read_text()), tensors(net)

    def list_names(group: h5py.Group, key: str, names: list[str]) -> None:
        if names and naming == "zero":
            group.attrs.create(key, names, dtype=h5py.string_dtype())
        else:
            group.attrs[key] = np.array([name.encode() for name in names] or np.zeros(0))

    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if full else file
        layers = [(*renamed(head, name, naming), weights) for name, _, weights in head["layers"]]
        list_names(group, "layer_names", [name for name, *_ in layers])
        for name, scope, weights in layers:
            layer, paths = group.create_group(name), [f"{scope}/{tensor}:0" for tensor, _ in weights]
            list_names(layer, "weight_names", paths)
            for tensor in paths:
                layer.create_dataset(tensor, data=next(values))
        if naming == "zero":
            list_names(group.create_group("top_level_model_weights"), "weight_names", [])
