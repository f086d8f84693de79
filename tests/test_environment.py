"""pyproject.toml, constraints.txt and environment.yml say the same."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"opencv-python-headless": "py-opencv", "torch": "pytorch"}


def requirements() -> list[Requirement]:
    """Return what pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for line in sum(extras, project["dependencies"])]


def pins() -> list[Requirement]:
    """Return the lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def conda() -> dict[str, SpecifierSet]:
    """Return the packages of environment.yml, of conda and of pip, with their version ranges."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (by_pip,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    assert by_pip[0] == "-e ."  # this package, editable
    parsed = [Requirement(entry) for entry in [*entries, *by_pip[1:]] if isinstance(entry, str)]
    assert len({entry.name for entry in parsed}) == len(parsed)
    return {entry.name: entry.specifier for entry in parsed}


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_pin_satisfies_its_requirement(requirement):
    name = canonicalize_name(requirement.name)
    versions = [pin.specifier for pin in pins() if canonicalize_name(pin.name) == name]
    assert versions
    for exact in versions:
        (version,) = exact
        assert version.operator == "=="
        assert requirement.specifier.contains(version.version)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_once_on_each_python(python):
    here = {"python_version": python, "python_full_version": python + ".5", "sys_platform": "linux"}
    found = [canonicalize_name(pin.name) for pin in pins() if pin.marker is None or pin.marker.evaluate(here)]
    for requirement in requirements():
        assert found.count(canonicalize_name(requirement.name)) == 1, requirement.name


def test_constraints_name_no_host_and_no_path():
    text = (ROOT / "constraints.txt").read_text()
    assert not any(word in text for word in ("://", "@", "/", "\\", "--"))


def test_conda_asks_for_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {CONDA_NAMES.get(each.name, each.name): each.specifier for each in requirements()}
    assert conda() == expected | {"python": SpecifierSet(project["requires-python"]), "pip": SpecifierSet()}
