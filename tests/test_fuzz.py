"""Damaged files: every reader gives what the file says, or an error of the project that names it.

`SEGPC_WRITE=1 pytest -m slow tests/test_fuzz.py` writes the counts into results/robustness.json, which 07_inputs shows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segpc_nb.files import write_bytes

HERE = Path(__file__).parent
COUNTS = HERE.parent / "results" / "robustness.json"
MANY = {"seed": 1, "mutants": 1000}  # per reader, fewer of slow ones


def fuzzed(seed, mutants):
    "What came of each reader; a process of its own, because readers in C may hang, crash or fill the memory."
    words = [HERE / "fuzz.py", "--seed", seed, "--mutants", mutants]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    found = {line.pop("reader"): line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"after {list(found)}: {done.stderr[-3000:]}"
    wrong = {name: counts["wrong"][:3] for name, counts in found.items() if counts["wrong"]}
    assert not wrong, json.dumps(wrong, indent=1)
    return found


def test_readers_refuse_damage_or_read_right():
    found = fuzzed(seed=0, mutants=20)
    assert sum(counts["mutants"] for counts in found.values()) == 637
    kept = json.loads(COUNTS.read_text())["fuzz"]
    assert kept["seed"] == MANY["seed"] and kept["mutants"] == MANY["mutants"]
    assert list(kept["readers"]) == list(found)
    assert all(counts["wrong"] == 0 for counts in kept["readers"].values())


@pytest.mark.slow  # 3 minutes
def test_readers_and_much_damage():
    found = {name: counts | {"wrong": len(counts["wrong"])} for name, counts in fuzzed(**MANY).items()}
    if os.environ.get("SEGPC_WRITE"):
        kept = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
        kept["fuzz"] = MANY | {"readers": found}
        write_bytes(COUNTS, json.dumps(kept, indent=1).encode() + b"\n")
