"""Nothing is fetched and nothing is sent: import, prediction and training in a process that can't open connections."""

import subprocess
import sys

BLOCKED = """
import socket, sys

def refuse(self, address, *rest):
    if self.family != getattr(socket, "AF_UNIX", None):
        print("CONNECTION", address, file=sys.stderr)
        raise OSError(f"no connection to {address}")

def unknown(host, *rest, **more):
    print("LOOKED UP", host, file=sys.stderr)
    raise OSError(f"no address of {host}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = unknown
"""
WORK = """
from pathlib import Path
from segpc_nb.cli import main

out = sys.argv[1]
assert main(["synth", f"{out}/data", "--pictures", "6"]) == 0
picture = min(Path(f"{out}/data/train/x").iterdir())
assert main(["predict", str(picture), "--out", f"{out}/found"]) == 0
short = ["--preset", "smoke", "--epochs", "1", "--data", f"{out}/data", "--out", f"{out}/run"]
assert main(["train", "nucleus", *short]) == 0
"""


def test_no_connection_is_tried(tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKED + WORK, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CONNECTION" not in done.stderr and "LOOKED UP" not in done.stderr
    assert (tmp_path / "found" / "cells.csv").exists()
