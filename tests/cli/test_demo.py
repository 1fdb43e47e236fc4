"""`hierens demo` and the example without arguments: two runs, compared depth by depth on the same images."""

import json
import re
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import hierens as package
from hierens.evaluation.metrics import correct_predictions
from hierens.training.data.loaders import create_held_out
from hierens.training.presets import PRESETS, preset
from support.command_line import hierens

DIFFERENCE = r"[+-]\d+\.\d\d ± \d+\.\d\d \([+-]\d+\)"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, hierens("demo", "--epochs", "1", "--output-dir", directory, "--json")


def test_for_machines_both_runs_are_in_one_object(done):
    directory, result = done
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert len(record["accuracy"]) == len(record["accuracy_without_distillation"]) == 4
    assert record["networks"] == [1, 2, 4, 8] and record["test_images"] == 1888
    assert record["picture"] == str(directory / "accuracy.png") and (directory / "accuracy.png").is_file()
    assert (directory / "model" / "config.json").is_file()


def test_it_ends_in_tables_of_differences_in_test_images_and_the_picture(done):
    directory, result = done
    lines = result.err.splitlines()
    accuracy = [line for line in lines if re.match(rf"\|\s+\d \|.* {DIFFERENCE} \|$", line) and "M |" in line]
    gains = [line for line in lines if re.match(rf"\|\s+[1-3] \|\s+{DIFFERENCE} \|\s+{DIFFERENCE} \|$", line)]
    assert len(accuracy) == 4 and len(gains) == 3, result.err
    assert "of the 1,888 test images" in result.err
    assert lines[-1] == f"picture: {directory / 'accuracy.png'}"


def test_the_differences_are_those_of_the_models_that_it_left(done):
    directory, result = done
    record, images = json.loads(result.out), create_held_out(preset("demo").data)
    right = [
        correct_predictions(package.from_pretrained(folder / "model"), DataLoader(images, 256))
        for folder in (directory, directory / "independent")
    ]
    for of, name in zip(right, ("accuracy", "accuracy_without_distillation"), strict=True):
        assert torch.allclose(100 * of.double().mean(0), torch.tensor(record[name]).double(), atol=1e-4)
    for depth in range(4):
        both = right[0][:, depth].int().sum() - right[1][:, depth].int().sum()
        row = rf"\|\s+{depth} \|.*M \|.*±.* \|$"
        line = next(line for line in result.err.splitlines() if re.match(row, line))
        assert f"({both:+d})" in line


def test_the_example_compares_only_the_demo_as_it_is(monkeypatch, tmp_path):
    import train_imagenet

    assert train_imagenet.recipe("", "") == train_imagenet.recipe("clothing", "") == PRESETS["demo"]
    assert train_imagenet.recipe("digits", "") == PRESETS["digits"]
    compared = []
    monkeypatch.setattr(train_imagenet, "compare_with_labels_only", compared.append)
    for run in (PRESETS["demo"], PRESETS["digits"]):
        monkeypatch.setattr(train_imagenet.cli, "train", lambda *args, run=run, **kwargs: run)
        monkeypatch.setattr(sys, "argv", ["train_imagenet.py"])
        train_imagenet.main()
    assert compared == [PRESETS["demo"]]
