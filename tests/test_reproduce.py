"""The chain of the run notebooks where a preset has several seeds and distils them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segpc_nb.pipeline import Segmenter, read_bundle_config
from segpc_nb.presets import load_preset, override, preset_yaml

root = Path(__file__).parent.parent


@pytest.mark.slow  # 3 minutes
def test_two_seeds_become_one_bundle_without_mirror_images(tmp_path):
    tiny = load_preset("smoke")
    for stage in ("nucleus", "cytoplasm"):
        tiny = override(tiny, stage, {"epochs": 1})
    plan = yaml.safe_load(preset_yaml(tiny))
    plan |= {"name": "tiny", "pictures": 20, "seeds": 2, "bundle": {"nucleus_threshold": 0.4}}
    plan["cytoplasm"] = {scale: plan["cytoplasm"][scale] for scale in (0.5, 1.75)}
    plan["distil"] = {"nucleus": {"epochs": 1}, "cytoplasm": {"epochs": 1}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plan))
    chain = [
        sys.executable,
        root / "nbs/runs/reproduce.py",
        "--preset",
        tmp_path / "tiny.yaml",
        "--out",
        tmp_path / "out",
    ]
    subprocess.run(chain, check=True, cwd=tmp_path, capture_output=True)
    out = tmp_path / "out"
    manifests = [json.loads((out / place / "nucleus/main/manifest.json").read_text()) for place in ("seed_0", "seed_1")]
    assert [manifest["seed"] for manifest in manifests] == [0, 1000]
    taught = json.loads((out / "distilled/cytoplasm_0.5/manifest.json").read_text())
    assert taught["teachers"] == [str(out / f"seed_{k}/cytoplasm_0.5/weights") for k in range(2)]
    config = read_bundle_config(out / "bundle")
    assert not config.flips and not config.nucleus_flips
    assert Segmenter.from_bundle(out / "bundle").config == config
    assert (out / "evaluate" / "scores.json").exists()
