"""The whole method in one command: the run notebooks, executed one after the other by papermill.

What a run finished is kept: its executed notebook stands in its folder, and the chain goes on with the next one.
A notebook that failed is kept too, as FAILED.ipynb, with its error in it.
"""

import argparse
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

here = Path(__file__).parent
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures belong into the notebooks
os.environ.setdefault("PYTHONHASHSEED", "0")


def execute(notebook, folder, **parameters):
    "Run one notebook, unless it has run to its end with these parameters before."
    import papermill

    done, failed = folder / "executed.ipynb", folder / "FAILED.ipynb"
    if (
        done.exists()
        and json.loads(done.read_text(encoding="utf-8"))["metadata"]["papermill"]["parameters"] == parameters
    ):
        print(f"{folder}: done before", flush=True)
        return done
    print(f"{folder}: {notebook}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(here / notebook, failed, parameters, kernel_name="python3", progress_bar=False)
    return failed.replace(done)


def report(executed):
    "The executed notebook as a page without code."
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(
        exclude_input=True, exclude_raw=True, exclude_input_prompt=True, exclude_output_prompt=True
    ).from_filename(executed)
    path = executed.with_name("report.html")
    path.write_text(page, encoding="utf-8")
    return path


def train(setting, jobs, folder, **common):
    "Both stages of one run."
    execute("1_nucleus.ipynb", folder / "nucleus", **common)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))

    def train_scale(scale):
        return execute("2_cytoplasm.ipynb", folder / f"cytoplasm_{scale}", **common, scale=scale)

    if setting.first is not None:  # the others start from it
        train_scale(setting.first)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train_scale, (scale for scale in setting.cytoplasm if scale != setting.first)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smoke", help="smoke, light, strong, paper or a YAML file (default: smoke)")
    parser.add_argument(
        "--data", default="", help="folder of the data set (default: SEGPC_DATA, else synthetic pictures)"
    )
    parser.add_argument("--out", default="", help="folder for all results (default: runs/PRESET)")
    parser.add_argument("--jobs", type=int, default=1, help="scales trained at the same time (default: 1)")
    chosen = parser.parse_args()
    from segpc_nb.distillation import DISTILLED, seed_presets
    from segpc_nb.presets import PRESETS, load_preset

    logging.getLogger("papermill").setLevel(logging.ERROR)
    preset = chosen.preset if chosen.preset in PRESETS else str(Path(chosen.preset).resolve())
    setting = load_preset(preset)
    out = Path(chosen.out or f"runs/{Path(preset).stem}").resolve()
    data = str(Path(chosen.data).resolve()) if chosen.data else ""
    common = {"preset": preset, "data": data, "out": str(out)}
    runs = {out: preset} if setting.seeds == 1 else seed_presets(setting, out)
    for folder, own in runs.items():
        train(setting, chosen.jobs, folder, preset=own, data=data, out=str(folder))
    if setting.distil:
        execute("distil.ipynb", out / DISTILLED, **common)
    if setting.yardstick:
        execute("yardstick.ipynb", out / "yardstick", **common)
    print(f"\nReport: {report(execute('3_evaluate.ipynb', out / 'evaluate', **common))}")


if __name__ == "__main__":
    sys.exit(main())
