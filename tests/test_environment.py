"""The versions that are installed for development fit what the package declares."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, group)
    if requirement.name != "hierens"
]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line) for line in lines), "versions, no addresses"
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_constraints_have_every_direct_dependency_within_its_bounds(requirement):
    version = pinned()[canonical(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True), f"{requirement} does not allow {version}"


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_direct_dependency_has_a_lowest_version(requirement):
    """`make test-lowest` has something to install."""
    assert {bound.operator for bound in requirement.specifier} & {">=", "=="}
