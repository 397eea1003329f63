"""Workflows, forms, containers and cluster scripts: what can be checked of them without their services."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segpc_nb.cli import make_parser

root = Path(__file__).parent.parent
workflows = sorted((root / ".github" / "workflows").glob("*.yaml"))
scripts = [root / "tests" / "install_wheel.sh", *sorted((root / "docs" / "deploy").glob("*.slurm"))]
pytestmark = pytest.mark.skipif(not workflows, reason="an sdist has no .github")

FORMS = {
    "vendor.github-workflows": workflows,
    "custom.github-workflows-require-timeout": workflows,
    "vendor.dependabot": [root / ".github" / "dependabot.yml"],
    "vendor.github-issue-config": [root / ".github" / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.github-issue-forms": [root / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("idea", "problem")],
    "vendor.citation-file-format": [root / "CITATION.cff"],
}


def steps(path):
    "All steps of a workflow."
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("schema", FORMS)
def test_files_follow_their_schema(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, FORMS[schema])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", workflows, ids=lambda path: path.stem)
def test_a_workflow_is_safe(path):
    "Actions are pinned to commits, permissions are few, and no shell line contains what somebody typed."
    flow = yaml.safe_load(path.read_text())
    assert flow["permissions"] == {"contents": "read"} and "concurrency" in flow
    for step in steps(path):
        assert "uses" not in step or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        assert "${{" not in step.get("run", ""), f"{step['run']}: hand values over by env"
    writing = {name: job["permissions"] for name, job in flow["jobs"].items() if "permissions" in job}
    assert set(writing) <= {"publish"}


def test_pushes_and_pull_requests_are_tested_once_on_every_system_and_python():
    flow = yaml.safe_load((root / ".github" / "workflows" / "test.yaml").read_text())
    on = flow[True]  # YAML 1.1 reads the word on as true
    assert on["push"] == {"branches": ["main"]} and "pull_request" in on
    matrix = flow["jobs"]["library"]["strategy"]["matrix"]
    assert [system.split("-")[0] for system in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]


def test_gpu_runs_wait_for_no_runner_and_keep_no_checkpoints():
    job = yaml.safe_load((root / ".github" / "workflows" / "gpu.yaml").read_text())["jobs"]["reproduce"]
    assert job["if"] == "vars.SEGPC_DATA != ''"
    kept = job["steps"][-1]["with"]["path"].split()
    assert kept and not any(pattern.endswith((".pt", "/**", "/*")) for pattern in kept)


def test_files_that_workflows_and_make_name_are_there():
    named = {word for path in workflows for step in steps(path) for word in step.get("run", "").split()}
    files = [
        word for word in named if re.fullmatch(r"(nbs|tests|docs|segpc_nb)/[\w./]+\.\w+|segpc_nb/bundle/LICENSE", word)
    ]
    assert len(files) >= 3 and all((root / name).is_file() for name in files), files


@pytest.mark.parametrize("path", scripts, ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_commands_and_options_in_scripts_exist():
    found = []
    for path in [*scripts, root / "docs" / "deploy" / "Dockerfile", root / "docs" / "deploy" / "predict_on_slurm.py"]:
        text = path.read_text().replace('", "', " ").replace('"segpc ', "segpc ")
        found += re.findall(r"segpc(?:-gpu)? (doctor|predict|reproduce|report|synth|evaluate)\b([^\n|;]*)", text)
    helps = {name: make_parser()._subcommands_action.choices[name].format_help() for name, _ in found}
    for name, rest in found:
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert option in helps[name], f"segpc {name} {option}"
    assert {"predict", "reproduce"} <= set(helps)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is for Linux")
def test_the_dockerfile_has_no_findings():
    command = ["hadolint", str(root / "docs" / "deploy" / "Dockerfile")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
