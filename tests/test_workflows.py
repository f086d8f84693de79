"""The workflows name what exists, run pinned code only, and may do no more than they have to."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
TASK = re.compile(r"\btasks\.py (\S+)")
PATH = re.compile(r"(?<![\w$/-])(?:\.ci|tests|book|mmlib|benchmarks|findings)/[\w./-]*")  # in the repository


def tasks() -> set[str]:
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.TASKS)


def steps(text: str) -> list[dict]:
    return [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]


def faults(text: str) -> list[str]:
    """Return what is wrong with a workflow."""
    used = [line.split("uses:")[1].strip() for line in text.splitlines() if "uses:" in line]
    found = [f"not pinned: {name}" for name in used if not PINNED.fullmatch(name)]
    if len(used) != sum("uses" in step for step in steps(text)):
        found.append("uses: stands on a line that is no step")
    for command in [step["run"] for step in steps(text) if "run" in step]:
        found += [f"no such task: {name}" for name in TASK.findall(command) if name not in tasks()]
        found += [f"no such file: {name}" for name in PATH.findall(command) if not (ROOT / name).exists()]
        found += ["text of others in a command"] * ("${{" in command)
    workflow = yaml.safe_load(text)
    if workflow.get("permissions") != {"contents": "read"}:
        found.append("permissions beyond contents: read, for every job")
    if "pull_request_target" in text or "secrets." in text:
        found.append("hands a secret to what a stranger sends")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_is_sound(file):
    assert faults(file.read_text(encoding="utf-8")) == []


def test_there_are_workflows_for_checks_pages_and_gpu():
    assert [file.stem for file in FILES] == ["ci", "full", "pages"]


GOOD = f"""permissions: {{contents: read}}
jobs:
  one:
    steps:
      - uses: actions/checkout@{"0a" * 20} # v4.2.2
      - run: python3 tasks.py test tests/test_tasks.py
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (f"{'0a' * 20} # v4.2.2", "v4 # v4.2.2", "not pinned"),
        ("# v4.2.2", "", "not pinned"),
        ("py test", "py tset", "no such task: tset"),
        ("test_tasks", "test_task", "no such file: tests/test_task.py"),
        ("py test", "py test ${{ github.head_ref }}", "text of others"),
        ("read", "write", "permissions"),
        ("jobs:", "on: pull_request_target\njobs:", "a stranger"),
    ],
)
def test_each_fault_is_found(old, new, complaint):
    assert faults(GOOD) == []
    assert any(complaint in found for found in faults(GOOD.replace(old, new)))
