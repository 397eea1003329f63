"""docs/results.md from the files in results/: `make readme`."""

import json
from pathlib import Path

from segpc_nb.metrics import SCORE_NAMES

docs = Path(__file__).parent
results = docs.parent / "results"


def load(name: str) -> dict:
    "One file of results/."
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    "A table in Markdown."
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def scores_table(
    run: dict,  # a file that `nbs/runs/3_evaluate.ipynb` wrote
    methods: tuple[str, ...] = (),  # rows; all without any
    columns: tuple[str, ...] = tuple(SCORE_NAMES),
) -> str:
    "The scores of a run, the official one with its interval."
    rows = []
    for method in methods or run["methods"]:
        scores = run["methods"][method]
        low, high = scores["ci"]["official"]
        cells = {name: f"{scores[name]:.3f}" for name in columns}
        cells["official"] += f" [{low:.3f}, {high:.3f}]"
        rows.append([method, *cells.values()])
    return table(["method", *(SCORE_NAMES[name] for name in columns)], rows)


def chosen_limit(run: dict) -> str:
    "The name that the chosen least score has among the nuclei of a run."
    score = run["chosen"]["min_score"]
    return next(name for name in (f"{score:.3f}", f"{score:.2f}") if name in run["nuclei"])


def nuclei_table(run: dict) -> str:
    "What stage one finds, by the least score of a nucleus."
    labels = {chosen_limit(run): f"{run['chosen']['min_score']:.3f} (chosen)"}
    names = ("nuclei per picture", "annotated ones found", "mean IoU of these")
    rows = [
        [labels.get(least, least), *(format(found[name], style) for name, style in zip(names, (".1f", ".1%", ".3f")))]
        for least, found in run["nuclei"].items()
    ]
    return table(["least score", *names], rows)


def network_rows(speed: dict, count: str) -> list[list[str]]:
    "The paper's networks on one picture, by backend."
    ways = speed[f"paper networks, {count}"]
    return [
        [
            f"the paper's networks, {count}, `--backend {backend}`",
            f"{ways[backend]['seconds']:.1f} s, {ways[backend]['ratio']:.1f} times as fast; "
            f"{ways[backend]['share of the networks']:.0%} of it in the networks",
        ]
        for backend in ("torch", "onnxruntime", "openvino")
    ]


def runtime_rows(run: dict, backends: tuple[str, ...], where: str) -> list[list[str]]:
    "How much faster than PyTorch a runtime is."
    rows = []
    for backend in backends:
        ratios = [ratio[backend] for ratio in run["ratio"].values()]
        found = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast"
        rows.append([f"`--backend {backend}` against PyTorch, by network and batch{where}", found])
    return rows


def speed_table() -> str:
    "The benchmarks in words."
    speed, runtimes, half, engine = (
        load(f"benchmarks/{name}") for name in ("speed", "runtimes", "runtimes_16_bits", "engine")
    )
    rows = [
        [
            f"everything but the networks, {count}",
            f"{row['project']:.2f} s, {row['ratio']:.0f} times as fast as the straightforward way",
        ]
        for count, row in speed["without networks"].items()
    ]
    for count in speed["without networks"]:
        rows += network_rows(speed, count)
    one, two = (speed["pictures per second by cores, shipped networks, 8 nuclei"][cores] for cores in "12")
    rows += [
        [
            f"the networks of the package, 8 nuclei, `--backend {backend}`",
            f"{one[backend]:.1f} pictures per second on one core, {two[backend]:.1f} on two",
        ]
        for backend in one
    ]
    pictures, peaks = zip(*speed["peak MB by pictures"].items())
    rows.append(
        [f"highest memory after {', '.join(pictures)} pictures", f"{', '.join(f'{peak:.0f}' for peak in peaks)} MB"]
    )
    rows += runtime_rows(runtimes, ("onnxruntime", "openvino"), "")
    other = ", on a processor that multiplies 16-bit numbers (`runtimes_16_bits.json`)"
    rows += runtime_rows(half, ("openvino", "openvino-bf16"), other)
    rows.append(["training engine against a bare loop", f"{engine['ratio']:.2f} of its samples per second"])
    return table(["what", "measured"], rows)


def crops_text(run: dict) -> str:
    "How often each scale is asked."
    asked, ratios = run["asked"], run["chosen"]["upper_ratios"]
    scales = [scale for scale in asked if scale != "nuclei"]
    counts = ", ".join(f"{asked[scale]} at {scale}" for scale in scales)
    crops = sum(asked[scale] for scale in scales) / (asked["nuclei"] * len(scales))
    limits = ", ".join(f"{ratio:.2f} at {scale}" for scale, ratio in zip(scales, ratios))
    return (
        f"Stage one finds {asked['nuclei']} nuclei in the held-out pictures, and the paper's selection needs crops for "
        f"{counts}:\n{crops:.0%} of all. Upper ratios, fitted on validation pictures: {limits}. "
        "A scale with -1 is never kept."
    )


def operating_table(run: dict) -> str:
    "What each operating point reaches."
    names = ("recall", "precision", "f1", "official", "pq")
    rows = [
        [name, f"{scores['least score']:.3f}", *(f"{scores[key]:.3f}" for key in names)]
        for name, scores in run["operating_points"].items()
    ]
    return table(["`--operating-point`", "least score", *(SCORE_NAMES[key] for key in names)], rows)


def annotated_table(run: dict, methods: tuple[str, ...]) -> str:
    "Nucleus and cytoplasm IoU where the networks see them, and where the annotation draws them."
    rows = []
    for method in methods:
        row = [method]
        for key in ("nucleus_iou", "cytoplasm_iou"):
            there = run["as_annotated"][method][key]
            row += [
                f"{run['methods'][method][key]:.3f}",
                f"{there['mean']:.3f} [{there['ci'][0]:.3f}, {there['ci'][1]:.3f}]",
            ]
        rows.append(row)
    return table(["method", "nucleus IoU", "as annotated", "cytoplasm IoU", "as annotated"], rows)


def results_page() -> str:
    "The text of docs/results.md."
    light, smoke = load("light"), load("smoke")
    methods, least = light["methods"], light["chosen"]["min_score"]
    return (
        (docs / "results.md.in")
        .read_text(encoding="utf-8")
        .format(
            real=scores_table(light),
            nuclei=nuclei_table(light),
            synthetic=scores_table(smoke),
            speed=speed_table(),
            crops=crops_text(light),
            operating=operating_table(light),
            annotated_places=annotated_table(light, ("paper", "fusion", "keep-all")),
            calibration=light["calibration_error"],
            paper=methods["paper"],
            yardstick=methods["yardstick: one network + watershed"],
            smoke=smoke["methods"]["paper"],
            least=least,
            found=light["nuclei"][chosen_limit(light)],
            annotated=methods["paper"]["cells"] / methods["paper"]["pictures"],
            overlap=methods["paper"]["pq"] / methods["paper"]["f1"],
            pictures=199 + 40 + methods["paper"]["pictures"],
            **{name: light["yardstick"][name] for name in ("epochs", "cpu_seconds")},
        )
    )


if __name__ == "__main__":
    (docs / "results.md").write_text(results_page(), encoding="utf-8")
