"""The study of stage two, with tiny numbers: it runs to its end, and goes on where it was stopped."""

import json
from pathlib import Path

import papermill
import pytest
import yaml

from segpc_nb.dataset import split_samples
from segpc_nb.metrics import RATIOS
from segpc_nb.results import write_masks
from segpc_nb.synthetic import make_dataset

STUDIES = Path(__file__).parent.parent / "nbs" / "studies"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "The result file and the folder of a study of three variants, one seed and one epoch."
    folder = tmp_path_factory.mktemp("study")
    data, runs = make_dataset(folder / "data", 10), folder / "runs"
    (runs / "nucleus").mkdir(parents=True)
    split = split_samples(data)
    for sample in (*split.train, *split.valid):
        write_masks(runs / "nucleus" / "nuclei", sample.id, sample.cells(), sample.image().shape[:2])
    plan = {
        "preset": "smoke",
        "scale": 1.75,
        "reference": "as it is",
        "seeds": [0],
        "train": {"epochs": 1, "size": [32, 32]},
    }
    plan["variants"] = {
        "as it is": {},
        "no nucleus": {"remove": ["nucleus channel"]},
        "plain": {"remove": ["channel attention", "refinement", "branch attention"]},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    given = {"data": str(data), "config": str(folder / "plan.yaml"), "nuclei": str(runs), "out": str(folder / "out")}

    def run():
        papermill.execute_notebook(
            STUDIES / "2_cytoplasm.ipynb",
            folder / "ran.ipynb",
            given,
            cwd=STUDIES,
            kernel_name="python3",
            progress_bar=False,
        )
        return json.loads((folder / "out" / "cytoplasm.json").read_text())

    return run(), folder / "out", run


def test_every_variant_is_trained_and_judged(ran):
    result, out, _ = ran
    for table in result["tables"].values():
        assert [row["variant"] for row in table if row["score"] == "official"] == ["as it is", "no nucleus", "plain"]
        assert all(row["difference"] == 0 for row in table if row["variant"] == "as it is")
        assert not any(row["counts"] for row in table)  # one seed shows nothing
    assert any(row["difference"] != 0 for row in result["tables"]["every nucleus"])
    assert result["seeds"] == [0] and result["pictures"]["holdout"] > 0
    kept = json.loads((out / "runs" / "plain" / "0.json").read_text())
    assert kept["ratios"] == list(RATIOS) and len(kept["pictures"]) == 2 * result["pictures"]["holdout"]


def test_a_study_goes_on_where_it_stopped(ran):
    result, out, run = ran
    (out / "runs" / "plain" / "0.json").unlink()
    marked = out / "runs" / "as it is" / "0.json"
    before = marked.stat().st_mtime_ns
    assert run()["tables"] == result["tables"]  # the same bits again
    assert marked.stat().st_mtime_ns == before
