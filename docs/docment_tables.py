"""Sphinx extension for the API pages.

Below each docstring: the parameters, from the comments of the signature (docments), and a link to the chapter.
Per module: its constants.
"""

import ast
import inspect
import re
from pathlib import Path

from fastcore.docments import docments
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

MARK = re.compile(r"# %% \.\./nbs/(\w+)\.ipynb #(\w+)")  # nbdev's line above the code of a cell


def table(
    header: list[str],
    rows: list[list[str]],
) -> list[str]:  # lines of reStructuredText
    "A table, left out when it has no rows."
    if not rows:
        return []
    lines = ["", ".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in [header, *rows]:
        lines += [f"   {'* -' if first else '  -'} {cell}" for first, cell in zip([True] + [False] * len(row), row)]
    return [*lines, ""]


def literal(value: str) -> str:
    "Code in reStructuredText."
    return f"``{value}``" if value else ""


def text(value: str | None) -> str:
    "A comment in reStructuredText: nothing in it is markup but code in backticks."
    return re.sub(
        r"`([^`]+)`|([*_|\\])", lambda match: literal(match[1]) or "\\" + match[2], " ".join((value or "").split())
    )


def parameters(symbol) -> list[str]:
    "The table of parameters and of what comes back."
    rows = []
    for name, entry in docments(symbol, full=True).items():
        given = entry.anno not in (inspect.Parameter.empty, None)
        if name != "self" and (given or entry.docment):
            kind = re.sub(r"~(?:\w+\.)*(\w+)", r"\1", stringify_annotation(entry.anno, "smart")) if given else ""
            rows.append(["*returns*" if name == "return" else literal(name), literal(kind), text(entry.docment)])
    return table(["parameter", "type", "what"], rows)


def constants(
    path: Path,  # of a module
    public: list[str],
) -> list[str]:
    "The table of a module's constants, as they stand in its code."
    code, rows = path.read_text(encoding="utf-8"), []
    lines = code.splitlines()
    for node in ast.parse(code).body:
        names = [
            part.id
            for target in getattr(node, "targets", [])
            for part in ast.walk(target)
            if isinstance(part, ast.Name) and part.id in public
        ]
        if names:
            value = ast.unparse(node.value)
            comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2]
            rows.append(
                [literal(", ".join(names)), literal(value if len(value) < 100 else value[:97] + "..."), text(comment)]
            )
    return table(["constant", "value", "what"], rows)


def chapter_link(
    module: str,  # file of a module
    line: int,  # first line of a symbol
) -> list[str]:
    "Where the code of a symbol is explained and shown."
    above = Path(module).read_text(encoding="utf-8").splitlines()[:line]
    chapter, cell = next(match.groups() for text in reversed(above) if (match := MARK.match(text)))
    return ["", f":ref:`code and examples in {chapter} <cell-{cell}>`", ""]


def add_tables(app: Sphinx, what: str, name: str, symbol, options, lines: list[str]) -> None:
    "Called by autodoc for every docstring."
    if what == "module":
        lines += constants(Path(symbol.__file__), symbol.__all__)
    elif what in ("function", "class", "exception", "method"):
        lines[:] = [text(line) for line in lines]
        lines += parameters(symbol)
        if what != "method":
            lines += chapter_link(inspect.getsourcefile(inspect.unwrap(symbol)), inspect.getsourcelines(symbol)[1])


def setup(app: Sphinx) -> dict:
    "Hooks it into autodoc."
    app.connect("autodoc-process-docstring", add_tables)
    return {"parallel_read_safe": True}
