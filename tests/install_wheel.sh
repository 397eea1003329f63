#!/usr/bin/env bash
# The project as a stranger gets it: sdist, wheel from it, an environment with nothing else, a picture predicted in another
# folder and without network. Usage: install_wheel.sh [highest|lowest-direct] [WHEEL]; prints sizes and seconds.
set -euo pipefail
resolution=${1:-highest} wheel=${2:-}
project=$(cd "$(dirname "$0")/.." && pwd)
[ -z "$wheel" ] || wheel=$(realpath "$wheel")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH SEGPC_DATA
command -v uv >/dev/null || { python3 -m venv tools && tools/bin/pip install --quiet uv; PATH=$work/tools/bin:$PATH; }
if [ -z "$wheel" ]; then
    uv build --quiet --python 3.11 --out-dir dist "$project" # the wheel is built from the sdist
    du -k dist/*
    wheel=$(echo dist/*.whl)
fi
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python --resolution "$resolution" "$wheel"
echo "environment: $(du -sm env | cut -f1) MB, $(uv pip list --quiet --python env/bin/python | tail -n +3 | wc -l) packages"
! env/bin/python -c "import torch" 2>/dev/null || { echo "PyTorch was installed"; exit 1; }

mkdir elsewhere && cd elsewhere
offline=$(unshare -rn true 2>/dev/null && echo "unshare -rn" || true)
$offline ../env/bin/segpc doctor | tail -n 1
$offline ../env/bin/segpc synth smears --pictures 2 >/dev/null
time $offline ../env/bin/segpc predict smears/train/x --out found
$offline ../env/bin/segpc evaluate --help >/dev/null
$offline ../env/bin/segpc report --pred found --pictures smears/train/x --out report.html
[ "$(wc -l <found/cells.csv)" -gt 1 ] || { echo "no cells"; exit 1; }
