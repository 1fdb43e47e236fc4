"""`hierens export` and `hierens push`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hierens.cli.sharing import card_results
from support.command_line import hierens
from support.hub_server import hub_server

ROOT = Path(__file__).parents[2]


@pytest.mark.sampled
def test_exporting_writes_a_file_per_depth(trained, tmp_path):
    pytest.importorskip("onnxscript")
    directory, *_ = trained
    done = hierens("export", directory / "run0" / "model", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    files = json.loads(done.out)["files"]
    assert sum(file.endswith(".onnx") for file in files) == 2


def test_exporting_with_a_policy_writes_one_graph(trained, tmp_path):
    pytest.importorskip("onnxscript")
    directory, *_ = trained
    (tmp_path / "policy.json").write_text('{"policy": "fixed", "depth": 1}')
    model, out = directory / "run0" / "model", tmp_path / "out"
    done = hierens("export", model, out, "--policy", tmp_path / "policy.json", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"] == [str(out / "export.json"), str(out / "model.onnx")]


@pytest.mark.sampled
def test_pushing_takes_results_and_policy_along(trained, tmp_path):
    """In a process of its own, since the Hub's address is read when huggingface_hub is imported."""
    directory, *_ = trained
    code = f"""
import os, sys
from _hierens_cli import main
sys.argv = ["hierens", "push", {str(directory / "run0" / "model")!r}, "somebody/digits", "--private", "--json"]
main()
os.environ["HF_TOKEN"] = "wrong"
main()
"""
    with hub_server() as hub:
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert json.loads(done.stdout)["url"].startswith(f"{hub.address}/somebody/digits/commit/")
        assert done.stderr.splitlines()[-1].startswith("error: somebody/digits was not pushed: ")
        wanted = hub.created["somebody/digits"]  # the word for it differs between versions of huggingface_hub
        assert wanted.get("visibility", wanted.get("private")) in ("private", True)
        accuracy = json.loads((directory / "run0" / "results.json").read_text())["accuracy"]
        card = hub.files("main")["README.md"].decode()
        assert "accuracy (%)" in card and f" {accuracy[1]:.2f} |" in card


def test_results_that_do_not_fit_a_model(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"accuracy": [1.0, 2.0], "macs": [1, 2], "nll": [0.5, 0.25]}')
    assert card_results(str(file), 2) == {"accuracy (%)": [1.0, 2.0], "NLL": [0.5, 0.25]}
    for content, message in (('{"accuracy": [1.0]}', "no results of 2"), ("[]", "no results"), ("{", "cannot be read")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            card_results(str(file), 2)
