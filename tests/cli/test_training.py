"""`hierens train`."""

import json

import yaml

from hierens.training.config import to_json
from hierens.training.presets import preset
from support.command_line import SMALL, hierens


def test_training_ends_in_a_table_of_depths_and_a_model(trained):
    directory, done, _ = trained
    assert "accuracy (%)" in done.out and f"model: {directory}/run0/model" in done.out
    results = json.loads((directory / "run0" / "results.json").read_text())
    assert len(results["accuracy"]) == len(results["macs"]) == 2 and len(results["leaf_accuracy"]) == 2
    row = next(line for line in done.out.splitlines() if line.startswith("|     1 |"))
    assert f"{results['accuracy'][1]:.2f}" in row and f"{results['nll'][1]:.3f}" in row


def test_for_machines_it_ends_in_one_object(trained):
    directory, _, done = trained
    record, results = json.loads(done.out), json.loads((directory / "run1" / "results.json").read_text())
    assert done.out.count("\n") == 1 and "epoch 1: accuracy" in done.err
    assert record["accuracy"] == results["accuracy"] and record["model"] == f"{directory}/run1/model"
    assert record["networks"] == [1, 2] and record["macs"] == results["macs"]


def test_the_configuration_that_is_printed_trains_the_same(tmp_path):
    done = hierens("train", *SMALL, "--print-config")
    assert done.code == 0, done.err
    config = yaml.safe_load(done.out)
    expected = to_json(preset("digits"))
    expected["train"] |= {"epochs": 1, "batch_size": 64}
    expected["model"]["blocks"] = 2
    assert config == expected
    (tmp_path / "run.yaml").write_text(done.out)
    again = hierens("train", "--config", tmp_path / "run.yaml", "--print-config")
    assert again.out == done.out
