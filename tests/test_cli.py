"""The command line as a user calls it: train, eval and report in a process of their own; faults in one line."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml
from accelerate.state import AcceleratorState

from hierens import cli
from hierens.training.config import to_json
from hierens.training.presets import preset

SMALL = ["--preset", "demo", "--epochs", "1", "--batch-size", "64", "--blocks", "2"]


@dataclass
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def hierens(*arguments):
    """A command run here, as the console script runs it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs that differ in their seed, and what the second printed."""
    directory = tmp_path_factory.mktemp("cli")
    for seed in (0, 1):
        done = hierens("train", *SMALL, "--seed", seed, "--output-dir", directory / f"run{seed}")
        assert done.code == 0, done.err
    return directory, done.out


def test_it_is_a_program():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hierens.cli"]
    help_ = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=120)
    assert help_.returncode == 0 and all(name in help_.stdout for name in cli.COMMANDS)
    wrong = subprocess.run([*command, "tain"], env=environment, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "did you mean 'train'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_training_ends_in_a_table_of_depths_and_a_model(trained):
    directory, output = trained
    assert "accuracy (%)" in output and f"model: {directory}/run1/model" in output
    results = json.loads((directory / "run1" / "results.json").read_text())
    assert len(results["accuracy"]) == len(results["macs"]) == 2 and len(results["leaf_accuracy"]) == 2
    row = next(line for line in output.splitlines() if line.startswith("|     1 |"))
    assert f"{results['accuracy'][1]:.2f}" in row and f"{results['nll'][1]:.3f}" in row


def test_evaluation_repeats_what_training_found(trained):
    directory, _ = trained
    done = hierens("eval", directory / "run1" / "model", "--json")
    assert done.code == 0, done.err
    results = json.loads((directory / "run1" / "results.json").read_text())
    found = json.loads(done.out)
    assert found["accuracy"] == pytest.approx(results["accuracy"]) and found["ece"] == pytest.approx(results["ece"])


def test_a_report_of_two_seeds(trained):
    directory, _ = trained
    done = hierens("report", directory / "run0", directory / "run1", "--output", directory / "out")
    assert done.code == 0, done.err
    assert "±" in done.out and (directory / "out" / "accuracy.png").is_file()


def test_the_configuration_that_is_printed_trains_the_same(tmp_path):
    done = hierens("train", *SMALL, "--print-config")
    assert done.code == 0, done.err
    config = yaml.safe_load(done.out)
    expected = to_json(preset("demo"))
    expected["train"] |= {"epochs": 1, "batch_size": 64}
    expected["model"]["blocks"] = 2
    assert config == expected
    (tmp_path / "run.yaml").write_text(done.out)
    again = hierens("train", "--config", tmp_path / "run.yaml", "--print-config")
    assert again.out == done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tain"], "there is no command 'tain', did you mean 'train'"),
        (["train", "--preset", "paper-cifra"], "did you mean 'paper-cifar'"),
        (["train", "--preset", "demo", "--config", "x"], "not both"),
        (["train", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["train", "--preset", "demo", "--objective", "nonsense"], "unknown objective 'nonsense'"),
        (["eval"], "name the model first"),
        (["eval", "nowhere", "--dataset", "digits"], "nowhere"),
        (["report", "nowhere"], "nowhere is no finished run"),
    ],
)
def test_faults_end_in_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hierens(*arguments)
    assert done.code == 2 and message in done.err, done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())
