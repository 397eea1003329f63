"""Studies: each runs from its first cell to its last, with tiny numbers on drawn pictures."""

import json
import re
from pathlib import Path

import pytest

from segpc_nb.pipeline import SHIPPED
from segpc_nb.synthetic import make_dataset

studies = Path(__file__).parent.parent / "nbs" / "studies"


def run_study(name, **parameters):
    "Execute the code of a study here, as papermill would with these parameters."
    notebook = json.loads((studies / f"{name}.ipynb").read_text(encoding="utf-8"))
    space = {"__name__": name}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(parameters) <= set(space)
                space |= {key: str(value) if isinstance(value, Path) else value for key, value in parameters.items()}
    return space


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("drawn"), 8, 0)


def check_facts(result):
    "Data, commit, seeds, split and machine are named."
    assert re.fullmatch("[0-9a-f]{64}", result["data_sha256"])
    assert {"commit", "machine", "seeds", "split", "n_boot"} <= set(result)
    assert json.loads(json.dumps(result)) == result


def test_scales(drawn, tmp_path):
    space = run_study("4_scales", data=drawn, out=tmp_path, n_boot=20, most=2)
    result = json.loads((tmp_path / "scales.json").read_text(encoding="utf-8"))
    check_facts(result)
    assert sum(result["histogram"]["counts"]) == sum(result["cells"].values()) == len(space["ratios"])
    for row in result["peaks"]:
        assert sum(row["bootstrap"].values()) == pytest.approx(1)
    for scale, nearby in zip(result["curve"], result["curve"][1:]):
        assert scale["coverage"] <= nearby["coverage"] and scale["bound"] <= nearby["bound"] + 1e-12
    assert result["curve"][-1]["coverage"] == 1 and result["curve"][-1]["bound"] == 1
    assert all(row["bound on grid"] <= row["bound"] + 0.01 for row in result["curve"])
    rules = {(row["rule"], row["on grid"]): row for row in result["sets"]}
    for on_grid in (False, True):
        assert rules["paper, 1", on_grid]["bound"] <= rules["paper, 2", on_grid]["bound"] + 1e-12
        assert rules["paper, 4", on_grid]["difference"] == 0
    assert rules["coverage, 4", False]["bound"] == pytest.approx(rules["coverage, 1", False]["bound"], abs=1e-6)


@pytest.mark.skipif(not (SHIPPED / "bundle.json").exists(), reason="this copy comes without trained networks")
def test_metrics(drawn, tmp_path):
    space = run_study("5_metrics", data=drawn, out=tmp_path, pictures=1, n_boot=20, area_boot=2)
    result = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    check_facts(result)
    assert result["pictures"] == 1
    found = {(row["variant"], row["score"]): row for row in result["rows"]}
    for variant in space["added"]:
        if variant.startswith("+"):  # more masks never lower the official score, and lower PQ
            assert found[variant, "official"]["difference"] >= 0 > found[variant, "pq"]["difference"]
    assert found["reported", "pq"]["difference"] == 0
    assert found["keep-all", "official"]["mean"] >= found["oracle", "official"]["mean"]
    official = [row["official"]["mean"] for row in result["curves"]]
    assert official == sorted(official, reverse=True)  # a higher limit leaves fewer masks
    assert result["sensitivity"]["official"]["best limit"] == 0
    assert result["sensitivity"]["official"]["area"] == pytest.approx(sum(official) / len(official))


def test_rivals(drawn, tmp_path):
    plan = {"preset": "smoke", "scale": 1.75, "reference": "classes", "seeds": [0]}
    plan["variants"] = {
        "plain": {"way": "two stages", "size": [32, 32], "remove": ["channel attention", "refinement"]},
        "classes": {"way": "watershed"},
        "objects": {"way": "objects", "lr": 1e-3},
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(plan), encoding="utf-8")
    space = run_study("7_rivals", data=drawn, out=tmp_path, config=tmp_path / "plan.yaml", trial_steps=1)
    result = json.loads((tmp_path / "rivals.json").read_text(encoding="utf-8"))
    check_facts(result)
    assert {row["variant"] for row in result["tables"]["balanced"]} == set(plan["variants"])
    trained = {name: run[0]["trained"] for name, run in result["facts"].items()}
    assert set(trained["plain"]) == {"stage one", "stage two"}
    assert all(part["steps"] == 1 for parts in trained.values() for part in parts.values())
    assert result["cells"]["all"] == sum(map(len, space["truth"]["holdout"].values()))
    assert result["cells"]["small"] + result["cells"]["large"] <= result["cells"]["all"]


@pytest.mark.slow  # a process for each way
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is measured on Linux only")
def test_cost(tmp_path):
    space = run_study("8_cost", out=tmp_path, rounds=1, cells=2, sizes="light")
    result = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    check_facts(result)
    rows = {row["way"]: row for row in result["rows"]}
    assert set(rows) == {name for size, name in space["WAYS"] if size == "light"}
    assert all(row["seconds"] > 0 and row["peak"] >= row["built"] > 0 for row in rows.values())
    assert rows["one scale"]["parameters"] < rows["four scales"]["parameters"]
    assert rows["seven Mask R-CNN"]["parameters"] == 7 * rows["Mask R-CNN"]["parameters"]


@pytest.mark.slow  # all pictures seven times
@pytest.mark.skipif(not (SHIPPED / "bundle.json").exists(), reason="this copy comes without trained networks")
def test_details(drawn, tmp_path):
    space = run_study("9_details", data=drawn, out=tmp_path, pictures=1)
    result = json.loads((tmp_path / "details.json").read_text(encoding="utf-8"))
    check_facts(result)
    assert {row["variant"] for row in result["rows"]} == set(space["VARIANTS"])
    assert all(row["difference"] == 0 for row in result["rows"] if row["variant"] == "as shipped")
    assert any(row["difference"] != 0 for row in result["rows"] if row["variant"] == "released mask")
