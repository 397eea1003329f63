"""Networks in other runtimes: the same answers and cells, caches that may be damaged, a choice that is remembered."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from segpc_nb import backends, runtimes
from segpc_nb.backends import cache_folders, convert_network, fastest_backend, with_backend
from segpc_nb.cells import iou_table
from segpc_nb.config import BundleConfig
from segpc_nb.models import build_network
from segpc_nb.pipeline import Segmenter, load_bundle
from segpc_nb.presets import load_preset
from segpc_nb.runtimes import NetworkPart, export_bundle, max_difference, network_parts
from segpc_nb.synthetic import make_picture

LIGHT = BundleConfig((96, 128), (1.75,), (64,))
RUNTIMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(backends.missing_packages(name)),
            reason=f"needs the extra {name}: {', '.join(backends.missing_packages(name))}",
        ),
    )
    for name in backends.EXTRAS
]
needs_onnx = pytest.mark.skipif(bool(backends.missing_packages("onnxruntime")), reason="needs the extra onnx")
needs_both = pytest.mark.skipif(
    any(map(backends.missing_packages, backends.EXTRAS)), reason="needs the extras onnx and openvino"
)


def spread(network, in_channels, side):
    "A network with random weights and statistics whose logits on noise are about -3 to 3."
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    head = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    with torch.inference_mode():
        logits = network.eval()(torch.rand(2, in_channels, side, side, generator=generator))
    with torch.no_grad():
        head.weight.mul_(1.5 / float(logits.std()))
        head.bias.zero_()
        head.bias.sub_(float(logits.mean()) * 1.5 / float(logits.std()))
    return network


def light_segmenter():
    "The light preset's two kinds of network with random weights."
    torch.manual_seed(0)
    preset = load_preset("light")
    nucleus, cytoplasm = (
        build_network(**settings | {"encoder_weights": None})
        for settings in (preset.nucleus.network, preset.cytoplasm[1.75].network)
    )
    return Segmenter(spread(nucleus, 3, 64), {1.75: spread(cytoplasm, 4, 64)}, LIGHT)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    "A segmenter and a cache that serves all tests of this file."
    return light_segmenter(), tmp_path_factory.mktemp("cache")


def tiny_segmenter(seed=0, scales=(0.5, 1.75)):
    "Networks that are converted in seconds."
    torch.manual_seed(seed)
    config = BundleConfig((64, 96), scales, (32,) * len(scales), (1.0,) * (len(scales) - 1))
    return Segmenter(
        build_network("unet", widths=(4, 8)),
        {scale: build_network("unet", in_channels=4, widths=(4, 8)) for scale in scales},
        config,
    )


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("name", ["nucleus", "cytoplasm_1.75"])
def test_probabilities_are_pytorchs(light, backend, name):
    segmenter, cache = light
    part = next(part for part in network_parts(segmenter) if part.name == name)
    other = convert_network(part, backend, cache_folders(cache))
    grids = [(96, 128), (160, 64)] if part.any_size else [part.size]
    images = torch.rand(1, part.in_channels, *grids[0], generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert part.network(images).sigmoid().std() > 0.1
    for grid in grids:
        for count in (1, 3, 16):
            assert max_difference(part.network, other, [(count, part.in_channels, *grid)]) < 1e-4, (grid, count)


@pytest.mark.parametrize("backend", RUNTIMES)
def test_cells_are_pytorchs(light, backend):
    segmenter, cache = light
    picture, truth = make_picture(np.random.default_rng(3))
    other = with_backend(segmenter, backend, cache)
    assert not isinstance(other.nucleus_network, torch.nn.Module) and other.config == segmenter.config
    nuclei = segmenter.nuclei(picture), other.nuclei(picture)
    assert len(nuclei[0]) == len(nuclei[1]) > 0
    for given in (None, truth):
        expected, cells = segmenter.segment(picture, nuclei=given), other.segment(picture, nuclei=given)
        assert [cell.id for cell in cells] == [cell.id for cell in expected] and len(cells) > 0
        assert np.diag(iou_table(expected, cells)).min() > 0.995
        assert all(abs(a.area - b.area) <= 5 for a, b in zip(cells, expected))


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "unet", "widths": (4, 8)},
        {"name": "attention-deeplabv3plus", "encoder_name": "resnet18", "decoder_channels": 8, "paper_head": True},
    ],
)
def test_the_papers_networks_can_be_converted(tmp_path, backend, settings):
    torch.manual_seed(0)
    network = build_network(in_channels=4, **settings).eval()
    part = NetworkPart("cytoplasm", network, 4, (64, 64), False)
    assert max_difference(network, convert_network(part, backend, [tmp_path]), [(3, 4, 64, 64)]) < 1e-4


@needs_both
def test_auto_measures_once_per_bundle(tmp_path, monkeypatch):
    calls, seconds = [], {"torch": 3.0, "onnxruntime": 2.0, "openvino": 1.0}

    def measure(segmenters):
        calls.append(sorted(segmenters))
        return {name: seconds[name] for name in segmenters}

    monkeypatch.setattr(backends, "seconds_per_picture", measure)
    segmenter = tiny_segmenter()
    assert fastest_backend(segmenter, tmp_path) == "openvino"
    assert fastest_backend(segmenter, tmp_path) == "openvino"
    assert type(with_backend(segmenter, "auto", tmp_path).nucleus_network).__name__ == "OpenVinoNetwork"
    assert calls == [["onnxruntime", "openvino", "torch"]]
    seconds["openvino"] = 9.0
    assert fastest_backend(tiny_segmenter(seed=1), tmp_path) == "onnxruntime"  # other weights
    monkeypatch.setattr(backends, "environment", lambda: {"versions": {}, "cpu": "another", "threads": 1})
    assert fastest_backend(segmenter, tmp_path) == "onnxruntime"
    assert len(calls) == 3


@needs_both
def test_auto_does_without_a_backend_that_fails(tmp_path, monkeypatch):
    real = runtimes.open_network

    def broken(backend, network, content):
        if backend == "openvino":
            raise RuntimeError("no such instruction")
        return real(backend, network, content)

    monkeypatch.setattr(backends, "open_network", broken)
    assert fastest_backend(tiny_segmenter(), tmp_path) in ("torch", "onnxruntime")
    (file,) = tmp_path.glob("fastest-*.json")
    assert json.loads(file.read_text())["failed"] == {"openvino": "no such instruction"}


def test_a_gpu_belongs_to_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "network_device", lambda network: "cuda")
    segmenter = tiny_segmenter()
    assert fastest_backend(segmenter, tmp_path) == "torch" and with_backend(segmenter, "auto", tmp_path) is segmenter
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="computes on the CPU, the networks are on cuda; use the backend 'torch'"):
            with_backend(segmenter, backend, tmp_path)


def test_without_extras_auto_is_pytorch_and_the_error_says_how_to_install(tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    segmenter = tiny_segmenter()
    assert with_backend(segmenter, "auto", tmp_path) is segmenter
    assert with_backend(segmenter, "torch", tmp_path) is segmenter
    with pytest.raises(ImportError, match=r"needs onnx; pip install 'segpc_nb\[onnx\]'"):
        with_backend(segmenter, "onnxruntime", tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'segpc_nb\[openvino\]'"):
        with_backend(segmenter, "openvino-bf16", tmp_path)
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("damage", ["half", "empty", "text", "another network", "changed weights"])
def test_a_file_that_does_not_agree_is_made_again(tmp_path, damage):
    import onnx

    part = network_parts(tiny_segmenter())[1]
    convert_network(part, "onnxruntime", [tmp_path])
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    if damage == "another network":
        bad = runtimes.onnx_bytes(network_parts(tiny_segmenter(seed=1))[1])
    elif damage == "changed weights":
        model = onnx.load_from_string(good)
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weights.raw_data = (2 * np.frombuffer(weights.raw_data, np.float32)).tobytes()
        bad = model.SerializeToString()
    else:
        bad = {"half": good[: len(good) // 2], "empty": b"", "text": b"not a network"}[damage]
    file.write_bytes(bad)
    assert max_difference(part.network, convert_network(part, "onnxruntime", [tmp_path]), [(2, 4, 32, 32)]) < 1e-4
    assert file.read_bytes() != bad
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@needs_onnx
def test_a_cache_that_cannot_be_written_is_replaced(tmp_path):
    part, blocked, other = network_parts(tiny_segmenter())[1], tmp_path / "file", tmp_path / "other"
    blocked.write_text("no folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_network(part, "onnxruntime", [blocked, other])
    assert len(list(other.glob("*.onnx"))) == 1
    with pytest.warns(UserWarning, match="give another cache"):
        network = convert_network(part, "onnxruntime", [blocked])
    assert max_difference(part.network, network, [(1, 4, 32, 32)]) < 1e-4


@needs_onnx
def test_a_bundle_becomes_a_folder_of_onnx_files(tmp_path):
    import onnx

    segmenter = tiny_segmenter()
    segmenter.save_bundle(tmp_path / "bundle")
    files = export_bundle(tmp_path / "bundle", tmp_path / "onnx")
    assert [path.name for path in files] == ["nucleus.onnx", "cytoplasm_0.5.onnx", "cytoplasm_1.75.onnx", "bundle.json"]
    assert (tmp_path / "onnx" / "bundle.json").read_bytes() == (tmp_path / "bundle" / "bundle.json").read_bytes()
    for path, part in zip(files, network_parts(load_bundle(tmp_path / "bundle"))):
        facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert facts["format"] == "segpc_nb" and facts["format_version"] == "1" and facts["part"] == part.name
        assert json.loads(facts["bundle"])["scales"] == [0.5, 1.75]
        opened = runtimes.OnnxRuntimeNetwork(path.read_bytes())
        assert max_difference(part.network, opened, [(2, part.in_channels, *part.size)]) < 1e-4
    with pytest.raises(ValueError, match="holds no bundle"):
        export_bundle(tmp_path, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@needs_onnx
def test_a_network_that_differs_is_never_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "OnnxRuntimeNetwork", lambda content: lambda images: images[:, :1])
    with pytest.raises(ValueError, match="probabilities differ from PyTorch's by"):
        runtimes.export_onnx(
            build_network("unet", widths=(4, 8)), tmp_path / "nucleus.onnx", 3, (64, 96), any_size=True
        )
    assert not list(tmp_path.iterdir())


def test_sixteen_bits_stay_near(light):
    segmenter, cache = light
    half = with_backend(segmenter, "torch-bf16", cache)
    assert (
        max_difference(segmenter.nucleus_network, half.nucleus_network, [(1, 3, 96, 128)])
        < runtimes.TOLERANCE["bfloat16"]
    )


def test_a_converted_segmenter_is_not_converted_again():
    arithmetic = Segmenter(lambda images: images[:, :1], {}, replace(LIGHT, scales=(), region_sizes=()))
    with pytest.raises(ValueError, match="only PyTorch's networks can be converted"):
        with_backend(arithmetic, "torch-bf16")


@pytest.mark.skipif(bool(backends.missing_packages("openvino")), reason="needs the extra openvino")
def test_openvino_does_not_report_its_use():
    script = "import sys; from segpc_nb.runtimes import import_runtime; import_runtime('openvino')"
    script += "; print(sys.modules['openvino_telemetry'])"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr
