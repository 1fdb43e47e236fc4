"""What a plain install brings: six packages, and nothing of the extras is imported with hierens."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

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
