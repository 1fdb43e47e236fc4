"""What a plain install brings, six packages and no more imports than those; and how long files and functions are."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CODE = """
import json, sys
import torch, timm
before = set(sys.modules)
import hierens
assert hierens.__all__ and all(hasattr(hierens, name) for name in hierens.__all__)
for make in (hierens.hierensify, hierens.multi_exit, hierens.tree_with_exits):
    make(timm.create_model("resnet8_cifar"), 2).macs()
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def names(requirements):
    return {line.partition(">")[0].partition("=")[0].partition("[")[0] for line in requirements}


@pytest.mark.sampled
def test_a_plain_install_needs_six_packages_and_imports_no_more():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) == {
        *("torch", "timm", "torchvision", "accelerate", "safetensors", "huggingface-hub")
    }
    extras = names(line for extra in project["optional-dependencies"].values() for line in extra) - {"hierens"}
    modules = {name.replace("-", "_") for name in extras} | {"sklearn", "yaml", "onnxruntime", "multipart"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not modules & set(json.loads(done.stdout.splitlines()[-1]))


COMPILING = """
import runpy, sys
sys.argv = ["hierens", *sys.argv[1:]]
try:
    runpy.run_module("hierens.cli", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
import hierens.training.run
assert "torch" in sys.modules
assert "torch.utils.cpp_extension" not in sys.modules, "it needs setuptools, and looks for CUDA"
"""


@pytest.mark.parametrize(
    "command",
    [
        ["profile", "resnet8_cifar", "--blocks", "2", "--size", "3", "32", "32"],
        pytest.param(
            ["train", "--preset", "digits", "--epochs", "1", "--batch-size", "64", "--blocks", "2", "--workers", "0"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["profile", "train"],
)
def test_measuring_and_training_look_for_no_compiler(tmp_path, command):
    command = [*command, *(["--output-dir", str(tmp_path)] if command[0] == "train" else [])]
    done = subprocess.run([sys.executable, "-c", COMPILING, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr


def test_the_versions_that_are_installed_are_those_that_are_allowed():
    """`constraints.txt` names one version of every requirement of all extras, and nothing but versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)])
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        assert not pin.url and [specifier.operator for specifier in pin.specifier] == ["=="], f"{line!r} is no version"
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for requirement in wanted:
        if requirement.name == "hierens":
            continue
        found = pins.get(canonicalize_name(requirement.name), [])
        assert any(pin.marker is None or pin.marker.evaluate() for pin in found), (
            f"make upgrade: {requirement} is missing"
        )
        for pin in found:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, but {pin}"


def test_files_and_functions_read_in_a_sitting():
    files = {path: path.read_text() for path in (ROOT / "hierens").rglob("*.py")}
    assert len(files) > 100 and not [path for path, text in files.items() if text.count("\n") > 350]
    functions = [
        (path.name, node)
        for path, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [(file, node.name) for file, node in functions if _lines_without_docstring(node) > 50]


def _lines_without_docstring(node):
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
