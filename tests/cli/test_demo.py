"""`hierens demo`: two runs, compared depth by depth on the same images."""

import json
import re

import pytest
import torch
from torch.utils.data import DataLoader

import hierens as package
from hierens.cli.demo import ARMS
from hierens.evaluation.metrics import correct_predictions
from hierens.training.data.loaders import create_held_out
from hierens.training.presets import PRESETS, preset
from support.command_line import hierens

DIFFERENCE = r"[+-]\d+\.\d\d ± \d+\.\d\d \([+-]\d+\)"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hierens.cli.demo.which", lambda name: name)
        return directory, hierens("demo", "--epochs", "1", "--output-dir", directory, "--json")


def test_for_machines_both_runs_are_in_one_object(done):
    directory, result = done
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert len(record["accuracy"]) == len(record["accuracy_without_distillation"]) == 4
    assert record["networks"] == [1, 2, 4, 8] and record["test_images"] == 1888
    assert record["picture"] == str(directory / "accuracy.png") and (directory / "accuracy.png").is_file()
    assert (directory / "model" / "config.json").is_file()


def test_it_ends_in_one_table_the_picture_and_the_next_step(done):
    directory, result = done
    ending = result.err[result.err.index("photographs of clothes, 1,888 test images") :].splitlines()
    header, _, *rows = (line for line in ending if line.startswith("|"))
    assert re.findall(r"[^| ]+(?: [^| ]+)*", header) == ["depth", "networks", "MACs", *ARMS, "difference"]
    assert len(rows) == 4 and all(re.search(rf"M \|.* {DIFFERENCE} \|$", row) for row in rows), result.err
    assert result.err.count("| depth") == 1, "there is no other table"
    next_step = f"next: hierens predict {directory / 'model'} IMAGE"
    assert ending[-2:] == [f"picture: {directory / 'accuracy.png'}", next_step]


@pytest.mark.sampled
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


def test_the_example_without_arguments_trains_the_same():
    import train_imagenet

    assert train_imagenet.recipe("", "") == train_imagenet.recipe("clothing", "") == PRESETS["demo"]
    assert train_imagenet.recipe("digits", "") == PRESETS["digits"]
