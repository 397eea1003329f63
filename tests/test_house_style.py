"""The house style, where it can be counted."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
chapters = sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))
runs = sorted([*(root / "nbs").glob("runs/*.ipynb"), *(root / "nbs").glob("studies/*.ipynb")])
modules = sorted(path for path in (root / "segpc_nb").glob("*.py") if not path.name.startswith("_"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def exported(path):
    return [
        source(cell) for cell in cells(path) if cell["cell_type"] == "code" and source(cell).startswith("#| export")
    ]


@pytest.mark.parametrize("path", chapters + runs, ids=lambda path: path.stem)
def test_title_and_quote(path):
    first = next(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    assert first.startswith("# ") and "\n> " in first


@pytest.mark.parametrize("path", chapters + runs, ids=lambda path: path.stem)
def test_no_execution_counts_and_no_paths_of_a_machine(path):
    for cell in cells(path):
        assert cell.get("execution_count") is None
    text = path.read_text(encoding="utf-8")
    for word in ("/root/", "/home/", "/tmp/", "site-packages"):
        assert word not in text, word


@pytest.mark.parametrize("path", chapters, ids=lambda path: path.stem)
def test_exported_cells_are_short_and_shown(path):
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    definitions = [
        i for i, text in enumerate(code) if text.startswith("#| export") and re.search(r"\n(def|class) [^_]", text)
    ]
    for i in definitions:
        limit = 110 if "\nclass " in code[i] else 50
        assert len(code[i].splitlines()) <= limit, code[i][:80]
    shown = [i for i in definitions if i + 1 < len(code) and not code[i + 1].startswith("#| export")]
    assert len(shown) >= 0.8 * len(definitions), [code[i][:60] for i in definitions if i not in shown]


@pytest.mark.parametrize("path", chapters, ids=lambda path: path.stem)
def test_a_chapter_that_exports_ends_with_the_export(path):
    if exported(path):
        assert source(cells(path)[-1]) == "#| hide\n#| eval: false\nimport nbdev\n\nnbdev.nbdev_export()"


@pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)
def test_functions_are_documented_and_no_wildcards(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(name.name != "*" for name in node.names)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            assert not node.name.startswith("test_")


@pytest.mark.parametrize("path", runs, ids=lambda path: path.stem)
def test_runs_have_parameters_first_and_no_outputs(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert "parameters" in code[0]["metadata"].get("tags", [])
    assert "skip_exec: true" in source(cells(path)[0])
    assert all(not cell["outputs"] for cell in code)


@pytest.mark.parametrize("path", runs, ids=lambda path: path.stem)
def test_papermill_understands_the_parameters(path):
    from papermill import inspect_notebook

    found = inspect_notebook(str(path))
    assert {"preset", "data", "out"} <= set(found)
    assert all(
        parameter["inferred_type_name"] in ("str", "int", "float") and parameter["help"] for parameter in found.values()
    ), found


@pytest.mark.parametrize("path", chapters + runs, ids=lambda path: path.stem)
def test_temporary_folders_end_with_the_notebook(path):
    assert "mkdtemp" not in "".join(map(source, cells(path))), (
        "use tempfile.TemporaryDirectory, which removes what it made"
    )


def test_numbers_are_unique():
    numbers = [path.stem[:2] for path in chapters]
    assert len(numbers) == len(set(numbers)), sorted(number for number in numbers if numbers.count(number) > 1)


@pytest.mark.parametrize("path", chapters[1:], ids=lambda path: path.stem)  # 00 is the guide to all of them
def test_a_chapter_imports_lower_numbers_only(path):
    number = {other.stem.split("_", 1)[1]: other.stem[:2] for other in chapters}
    code = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")
    for module in re.findall(r"from segpc_nb\.(\w+) import", code):
        assert number[module] < path.stem[:2], module


@pytest.mark.parametrize("path", [*chapters, *runs, root / "nbs" / "index.ipynb"], ids=lambda path: path.stem)
def test_links_to_notebooks_exist(path):
    text = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\(([^)#:]+\.ipynb)", text):
        assert (path.parent / link).exists(), link


def test_modules_stay_small():
    lengths = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert statistics.median(lengths.values()) <= 200, lengths
    assert max(lengths.values()) <= 350, lengths


@pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name


@pytest.mark.parametrize("path", chapters + runs, ids=lambda path: path.stem)
def test_no_state_of_widgets_is_kept(path):
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


def test_notebooks_stay_small():
    assert sum(path.stat().st_size for path in chapters + runs) < 6_000_000


def test_readme_is_made_from_the_index():
    import runpy

    assert (root / "README.md").read_text(encoding="utf-8") == runpy.run_path(str(root / "nbs" / "readme.py"))[
        "readme"
    ]()


def test_the_readme_is_short():
    assert len((root / "README.md").read_text(encoding="utf-8").split()) <= 1200


def score_rows(name):
    "How each method of a run begins in a table."
    run = json.loads((root / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for method, scores in run["methods"].items():
        low, high = scores["ci"]["official"]
        yield f"| {method} | {scores['official']:.3f} [{low:.3f}, {high:.3f}] | {scores['pq']:.3f} |"


def test_the_table_of_the_readme_is_that_of_the_run():
    text = (root / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("## ")[0]
    rows = [line for line in text.splitlines() if re.match(r"\| .*\[0\.", line)]
    found = [row for row in score_rows("light") if any(line.startswith(row) for line in rows)]
    assert len(rows) == len(found) == 8


@pytest.mark.parametrize(
    "path", map((root / "results").joinpath, ("light.json", "smoke.json")), ids=lambda path: path.stem
)
def test_the_results_page_has_every_row_of_the_runs(path):
    text = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert [row for row in score_rows(path.stem) if row not in text] == []


def test_the_results_page_is_made_from_the_results():
    import runpy

    page = runpy.run_path(str(root / "docs" / "results_page.py"))["results_page"]()
    assert (root / "docs" / "results.md").read_text(encoding="utf-8") == page


def test_the_speeds_of_the_results_page_are_those_of_the_benchmarks():
    speed, engine = (
        json.loads((root / "results" / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("speed", "engine")
    )
    text = (root / "docs" / "results.md").read_text(encoding="utf-8")
    for count, row in speed["without networks"].items():
        assert (
            f"| everything but the networks, {count} | {row['project']:.2f} s, {row['ratio']:.0f} times as fast" in text
        )
    assert f"| {engine['ratio']:.2f} of its samples per second |" in text
    asked = json.loads((root / "results" / "light.json").read_text(encoding="utf-8"))["asked"]
    assert f"{asked['1.75']} at 1.75" in text and f"finds {asked['nuclei']} nuclei" in text


@pytest.mark.parametrize("path", sorted((root / "results" / "benchmarks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_kept_benchmark_ran_the_code_that_is_there(path):
    assert [source(cell) for cell in cells(path)] == [source(cell) for cell in cells(root / "nbs" / "runs" / path.name)]
    assert any(cell.get("outputs") for cell in cells(path)) and "/tmp/" not in path.read_text(encoding="utf-8")
