"""Fail when a module differs from its notebook or a notebook is not clean. Works on a copy; changes nothing."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).parent.parent
tools = Path(sys.executable).parent


def differences(ours: Path, theirs: Path, pattern: str) -> list[str]:
    "Files below `ours` that are missing from `theirs` or differ, and the other way round."
    names = {
        path.relative_to(top)
        for top in (ours, theirs)
        for path in top.rglob(pattern)
        if ".ipynb_checkpoints" not in path.parts
    }
    return [
        str(name)
        for name in sorted(names)
        if not (
            (ours / name).is_file()
            and (theirs / name).is_file()
            and filecmp.cmp(ours / name, theirs / name, shallow=False)
        )
    ]


with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "project"
    copy.mkdir()
    for name in ("nbs", "segpc_nb"):
        shutil.copytree(
            root / name,
            copy / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs" if name == "segpc_nb" else ""),
        )
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, copy / name)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([tools / command], cwd=copy, check=True)
    stale = differences(root / "segpc_nb", copy / "segpc_nb", "*.py")
    dirty = differences(root / "nbs", copy / "nbs", "*.ipynb")

for name in stale:
    print(f"segpc_nb/{name} is not what the notebooks export: run nbdev_export")
for name in dirty:
    print(f"nbs/{name} is not clean: run nbdev_clean")
sys.exit(bool(stale or dirty))
