"""How many small faults in a module its own tests notice: `python tests/mutate.py cells metrics --count 40`.

One operator, comparison or number is changed at a time, the tests of the module run until the first failure, and the
share of noticed changes goes into results/robustness.json. A run that takes too long counts as noticed.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "results" / "robustness.json"
TESTS = {
    "cells": ["cells"],
    "metrics": ["metrics"],
    "regions": ["regions"],
    "aggregation": ["aggregation"],
    "nuclei": ["pipeline", "batch", "peaks"],
}
OTHERS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Not: ast.UAdd,
    ast.USub: ast.UAdd,
}


def places(tree):
    "What can be changed: nodes, fields, and what stands there instead; annotations mean nothing."
    for node in ast.walk(tree):
        for hint in ("annotation", "returns"):
            if getattr(node, hint, None):
                setattr(node, hint, ast.Constant(None))
    for node in ast.walk(tree):
        for field in ("op", "ops"):
            found = getattr(node, field, None)
            old = found[0] if isinstance(found, list) else found
            if type(old) in OTHERS and not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.JoinedStr)):
                new = OTHERS[type(old)]()
                yield node, field, [new, *found[1:]] if isinstance(found, list) else new
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "value", node.value + 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value


def mutants(path, count, seed):
    "Line, change and text of a sample of mutants."
    text = path.read_text(encoding="utf-8")
    total = len(list(places(ast.parse(text))))
    for number in sorted(random.Random(seed).sample(range(total), min(count, total))):
        tree = ast.parse(text)
        node, field, new = list(places(tree))[number]
        before = ast.unparse(node)
        setattr(node, field, new)
        yield (
            getattr(node, "lineno", 0),
            f"{before} -> {ast.unparse(node)}",
            ast.unparse(ast.fix_missing_locations(tree)),
        )


def noticed(folder, module, text, limit):
    "Do the tests of a module fail with this text in its place?"
    path = folder / "segpc_nb" / f"{module}.py"
    whole = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    tests = [f"tests/test_{name}.py" for name in TESTS[module]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=limit, check=False)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(whole, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], default=[])
    parser.add_argument("--count", type=int, default=40, help="mutants of a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=300, help="seconds that a mutant may take")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "docs", "_proc"))
        for module in given.modules or TESTS:
            path = folder / "segpc_nb" / f"{module}.py"
            if noticed(folder, module, path.read_text(encoding="utf-8"), given.limit):
                raise SystemExit(f"the tests of {module} fail, or take too long, without any change")
            made = list(mutants(path, given.count, given.seed))
            survivors = [
                [line, change] for line, change, text in made if not noticed(folder, module, text, given.limit)
            ]
            row = {"seed": given.seed, "mutants": len(made), "noticed": len(made) - len(survivors)}
            kept = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
            kept.setdefault("mutation", {})[module] = row | {"survivors": survivors}
            COUNTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(module, row, *survivors, sep="\n")


if __name__ == "__main__":
    main()
