"""Recipes by name and from files: what is printed can be read back, and what cannot be read is named."""

import json

import pytest
import yaml

from hierens.training.config import to_json
from hierens.training.presets import PRESETS, dump_run, load_run, preset
from hierens.training.run import Run


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_run_is_read_back_the_same(name, tmp_path):
    for text, suffix in ((dump_run(preset(name)), "yaml"), (json.dumps(to_json(preset(name))), "json")):
        file = tmp_path / f"run.{suffix}"
        file.write_text(text)
        assert to_json(load_run(file)) == to_json(preset(name))
        assert load_run(file).train == preset(name).train


def test_a_file_may_change_a_few_fields_of_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper-cifar\ntrain: {epochs: 3, lr: 1e-3, decay_epochs: [1, 2], clip_grad: 2.5}\n")
    run = load_run(file)
    assert (run.train.epochs, run.train.lr, run.train.decay_epochs, run.train.clip_grad) == (3, 1e-3, (1, 2), 2.5)
    assert run.model == preset("paper-cifar").model and run.train.weight_decay == 5e-4


def test_the_papers_recipes_are_the_papers():
    imagenet, cifar = preset("paper-imagenet"), preset("paper-cifar")
    assert (imagenet.train.batch_size, imagenet.train.epochs, imagenet.train.weight_decay) == (450, 150, 1e-5)
    assert (cifar.train.batch_size, cifar.train.epochs, cifar.train.weight_decay) == (128, 200, 5e-4)
    for run, alpha in ((imagenet, 0.75), (cifar, 0.5)):
        assert (run.train.lr, run.train.momentum, run.train.temperature, run.train.alpha) == (0.1, 0.9, 2.0, alpha)
        assert run.train.objective == "independent+hierarchical_codistillation"
        assert run.data.color_jitter == 0 and run.model.backbone.startswith("hne_")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 3}", "there is no field 'epoch', did you mean 'epochs'"),
        ("trian: {epochs: 3}", "there is no field 'trian', did you mean 'train'"),
        ("preset: paper-cifra", "no preset 'paper-cifra', did you mean 'paper-cifar'"),
        ("train: 3", "train must hold fields by name, got 3"),
        ("train: {epochs: many}", "epochs must be int, got 'many'"),
        ("train: {precision: fp8}", "precision must be .*fp16.*, got 'fp8'"),
        ("train: {epochs: 0}", "epochs must be at least 1"),
        ("- 1", "is no configuration"),
        ("a: [", "cannot be read as a configuration"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as a configuration"),
    ],
)
def test_bad_files_are_named_with_their_fault(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(file)


def test_a_missing_file_and_defaults(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_run(tmp_path / "none.yaml")
    file = tmp_path / "empty.yaml"
    file.write_text(yaml.safe_dump({"train": {}}))
    assert load_run(file) == Run()
