"""The documentation site: `make docs`.

Copies the notebooks as pages, adds the gallery and the API pages, and hands them to Sphinx.
Nothing is executed or fetched.
"""

import ast
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

from PIL import Image
from sphinx.cmd.build import main as sphinx_build

docs = Path(__file__).parent
root = docs.parent
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars; they need a kernel
THUMBNAIL = 640  # longest side in the gallery, px


def source(cell: dict) -> str:
    "The text of a cell."
    return "".join(cell["source"])


def only_imports(code: str) -> bool:
    "Does the cell define nothing?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body)


def picture(
    cell: dict,
) -> bytes | None:  # PNG
    "The first figure a code cell shows."
    return next(
        (
            base64.b64decode("".join(output["data"]["image/png"]))
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ),
        None,
    )


def code_page(
    cell: dict,
) -> list[dict]:  # none, or the cell behind the target that other pages link to
    "A code cell without nbdev's directives: imports folded, the library's own code marked, plumbing left out."
    lines = source(cell).splitlines()
    directives = [line for line in lines if line.startswith("#|")]
    code = "\n".join(line for line in lines if line not in directives).strip()
    if "#| hide" in directives or not code:
        return []
    tags = ["remove-input" if tag == "hide-input" else tag for tag in cell["metadata"].get("tags", [])]
    if "#| export" in directives:
        tags += ["hide-input"] if only_imports(code) else ["export"]
    outputs = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]
    page = cell | {"source": code, "outputs": outputs, "metadata": {"tags": tags}}
    linked = "export" in tags or picture(cell)
    return (
        [{"cell_type": "markdown", "metadata": {}, "id": f"t{cell['id']}", "source": f"(cell-{cell['id']})="}, page]
        if linked
        else [page]
    )


def caption_after(
    cells: list[dict],
    i: int,  # place of a code cell
) -> str:  # one line of Markdown, empty without a caption
    "The caption below a figure."
    text = source(cells[i + 1]) if i + 1 < len(cells) and cells[i + 1]["cell_type"] == "markdown" else ""
    return " ".join(text.split("\n\n")[0].split()) if text.startswith("**Figure") else ""


def plain(markdown: str) -> str:
    "Markdown as a text for those who do not see the figure."
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown).replace("*", "").replace("`", "").replace('"', "'")


def notebook_page(
    path: Path,  # .ipynb with its outputs
) -> tuple[
    dict, str, list[tuple[str, str, bytes]]
]:  # the notebook for Sphinx, its title, and its figures: target, caption, PNG
    "One chapter or run as a page."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells, pages, figures = [cell for cell in notebook["cells"] if cell["cell_type"] != "raw"], [], []
    module = next((match[1] for cell in cells if (match := re.match(r"#\| default_exp (\w+)", source(cell)))), None)
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            pages.append(cell | {"source": source(cell)})
            continue
        shown = code_page(cell)
        if shown and picture(cell):
            caption = caption_after(cells, i)
            figures.append((f"cell-{cell['id']}", caption, picture(cell)))
            shown[-1]["metadata"]["mystnb"] = {"image": {"alt": plain(caption) or f"Figure of {path.stem}"}}
        pages += shown
    title = re.match(r"# (.*)", pages[0]["source"])[1]
    if module:
        link = (
            f"Module `segpc_nb.{module}`: [reference](../api/{module}.rst). Code with a coloured edge is what it holds."
        )
        pages[0]["source"] = re.sub(r"((?:\n>.*)+)", rf"\1\n\n{link}", pages[0]["source"], count=1)
    return (
        {
            "cells": pages,
            "metadata": {"kernelspec": notebook["metadata"]["kernelspec"]},
            "nbformat": 4,
            "nbformat_minor": 5,
        },
        title,
        figures,
    )


def thumbnail(
    png: bytes,
    path: Path,  # .png
) -> None:
    "A figure made small."
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(path, optimize=True)


def gallery_section(
    notebook: str,  # from the project's root
    title: str,
    figures: list[tuple[str, str, bytes]],  # target, caption, PNG
    folder: Path,  # of the thumbnails
) -> str:
    "The figures of one chapter as cards that lead to them."
    cards = [f"## [{title}]({notebook})\n\n::::{{grid}} 1 2 2 2\n:gutter: 3\n"]
    for target, caption, png in figures:
        thumbnail(png, folder / f"{target}.png")
        cards.append(
            f":::{{grid-item-card}}\n:img-top: {folder.name}/{target}.png\n:img-alt: {plain(caption) or title}\n"
            f":link: {target}\n:link-type: ref\n:link-alt: {title}\n{plain(caption)}\n:::\n"
        )
    return "\n".join(cards) + "::::\n"


def write_pages(
    out: Path,  # a new folder for Sphinx to read
) -> None:
    "All pages: those of docs/, the notebooks, the gallery and one per module."
    shutil.copytree(docs, out, ignore=shutil.ignore_patterns("*.py", "*.in", "_static", "__pycache__"))
    shutil.copytree(root / "nbs" / "images", out / "nbs" / "images")
    for folder in ("nbs/runs", "nbs/studies", "api", "thumbnails"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for page in (out / "reading.md", out / "tutorial.md"):  # their links work in the repository too
        page.write_text(page.read_text(encoding="utf-8").replace("](../nbs/", "](nbs/"), encoding="utf-8")
    gallery = [(out / "gallery.md").read_text(encoding="utf-8")]
    for path in [
        root / "nbs" / "index.ipynb",
        *sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb")),
        *sorted((root / "nbs").glob("runs/*.ipynb")),
        *sorted((root / "nbs").glob("studies/*.ipynb")),
    ]:
        kept = root / "results" / "benchmarks" / path.name  # a benchmark as it ran
        page, title, figures = notebook_page(kept if kept.exists() else path)
        text = json.dumps(page).replace("](../docs/", "](../")
        (out / path.relative_to(root)).write_text(text, encoding="utf-8")
        if figures:
            gallery.append(gallery_section(path.relative_to(root).as_posix(), title, figures, out / "thumbnails"))
    (out / "gallery.md").write_text("\n".join(gallery), encoding="utf-8")
    for path in (root / "segpc_nb").glob("[a-z]*.py"):
        name = f"segpc_nb.{path.stem}"
        (out / "api" / f"{path.stem}.rst").write_text(
            f"{path.stem}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n", encoding="utf-8"
        )


def build(
    out: Path,  # the site will be out/html; what was there before goes
) -> int:  # 0, or 1 after warnings
    "The whole site."
    shutil.rmtree(out, ignore_errors=True)
    write_pages(out / "source")
    return sphinx_build(
        [
            "-q",
            "-W",
            "--keep-going",
            "-c",
            str(docs),
            "-d",
            str(out / "doctrees"),
            str(out / "source"),
            str(out / "html"),
        ]
    )


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1])))
