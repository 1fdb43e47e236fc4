"""Multi-exit networks by the same trainer: learnt, resumed in the same bits, gone on with, by flags alone."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

import hierens
from hierens import cli
from hierens.training.config import ModelConfig, TeacherConfig
from hierens.training.presets import PRESETS
from hierens.training.run import Run, create_ensemble, train
from hierens.training.trainer import Trainer

DEMO = PRESETS["demo-exits"]
WITH_EXITS = {"method": "hne_exits", "collaborate": False}


def run(directory, model=None, **settings):
    short = {"epochs": 1, "batch_size": 64, "output_dir": str(directory)}
    small = {"backbone_args": {"channels": [4, 8, 8]}, "head": "pool"}
    return Run(
        DEMO.data,
        dataclasses.replace(DEMO.model, **small | (model or {})),
        dataclasses.replace(DEMO.train, **short | settings),
        TeacherConfig(),
    )


@pytest.mark.sampled
def test_the_recipe_learns_digits_at_every_exit(tmp_path):
    recipe = run(tmp_path, {"backbone_args": {"channels": [8, 16, 32]}, "head": "conv"}, epochs=6)
    model, record = train(recipe)
    assert isinstance(model, hierens.MultiExit) and model.collaborate and model.gradient_equilibrium
    assert len(record["accuracy"]) == 3 and record["accuracy"][0] > 30 and record["accuracy"][-1] > 85
    saved = hierens.from_pretrained(tmp_path / "model")
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(saved(x, reduce=False), model(x, reduce=False), atol=1e-5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["leaves"] == [1, 2, 3] and results["macs"] == list(model.macs())


@pytest.mark.sampled
def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(tmp_path, monkeypatch):
    """With all there is: learned weights, the ensemble's loss, distillation, an average of the weights, mixup."""
    weighing = {"exit_weights": "linear_rising", "learn_weights": True, "exit_average": "probabilities"}
    settings = {"objective": "one_for_all+ensemble", "epochs": 2, "ema_decay": 0.9, "mixup": 0.2, "lr": 0.05}
    train(run(tmp_path / "full", weighing, **settings))
    fit = Trainer.fit

    def one_epoch(self, **kwargs):  # stops after an epoch, the schedule being for two
        self.config = dataclasses.replace(self.config, epochs=1)
        return fit(self, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", one_epoch)
        train(run(tmp_path / "parts", weighing, **settings))
    train(run(tmp_path / "parts", weighing, **settings))
    for name in ("model", "model_ema"):
        full, parts = (Path(tmp_path / p / name / "model.safetensors").read_bytes() for p in ("full", "parts"))
        assert full == parts
    weights = hierens.from_pretrained(tmp_path / "full" / "model").weights
    assert (weights - torch.tensor([1.0, 2.0, 3.0]) / 6).abs().max() > 1e-4, "they were learned"


def test_boosted_exits_are_made_by_flag(tmp_path):
    assert create_ensemble(run(tmp_path, {"boosted": True}), 10).boosted
    assert not create_ensemble(run(tmp_path), 10).boosted


@pytest.mark.sampled
def test_a_second_stage_goes_on_from_the_first(tmp_path):
    first, _ = train(run(tmp_path / "first", {"collaborate": False}, objective="independent"))
    assert not first.collaborate
    stage = {"start": str(tmp_path / "first" / "model"), "collaborate": True}
    with pytest.raises(ValueError, match="is not boosted: omit boosted"):
        train(run(tmp_path / "other", stage | {"boosted": True}))
    second, _ = train(run(tmp_path / "second", stage, lr=1e-9, epochs=1, weight_decay=0.0, warmup_epochs=0))
    assert second.collaborate
    named = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.allclose(parameter, named[name], atol=1e-5), name


@pytest.mark.sampled
def test_a_tree_with_exits_learns_by_the_same_trainer(tmp_path):
    tree = {**WITH_EXITS, "backbone_args": {"channels": [8, 16, 32]}, "blocks": 3, "head": "conv"}
    objective = {"objective": "independent+hierarchical_codistillation", "alpha": 0.5, "gradient_equilibrium": False}
    recipe = run(tmp_path, tree, **objective, optimizer="adamw", lr=0.01, warmup_epochs=0, epochs=4, ema_decay=0.95)
    model, record = train(recipe)
    assert isinstance(model, hierens.TreeWithExits) and not model.symmetric
    assert len(record["accuracy"]) == len(record["ema_accuracy"]) == 5 and record["accuracy"][-1] > 60
    saved = hierens.from_pretrained(tmp_path / "model")
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(saved(x, reduce=False), model(x, reduce=False), atol=1e-5)


def test_flags_alone_train_a_multi_exit_network(tmp_path):
    flags = ["--method", "multi_exit", "--exits", "2", "--exit-weights", "uniform", "--objective", "ensemble"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["train", "--preset", "digits", *flags, "--epochs", "1", "--output-dir", str(tmp_path)])
    assert "exits" in out.getvalue() and "accuracy" in out.getvalue()
    with contextlib.redirect_stdout(out):
        cli.main(["eval", str(tmp_path / "model")])
    model = hierens.from_pretrained(tmp_path / "model")
    assert isinstance(model, hierens.MultiExit) and model.leaves == 2


@pytest.mark.sampled
def test_the_second_stage_trains_new_classifiers_with_the_first_as_teacher(tmp_path):
    """With the settings of the preset `imta-stage2`, on digits."""
    stage = PRESETS["imta-stage2"]
    kept = ("classifiers_only", "objective", "alpha", "temperature", "mean_over_classes", "gradient_equilibrium")
    first, _ = train(run(tmp_path / "1", {"collaborate": False, "head": "conv"}, objective="independent"))
    where = str(tmp_path / "1" / "model")
    settings = {name: getattr(stage.train, name) for name in kept}
    start = dataclasses.asdict(dataclasses.replace(stage.model, start=where))
    second = run(tmp_path / "2", start, alpha_warmup_epochs=0, **settings)
    second = dataclasses.replace(second, teacher=dataclasses.replace(stage.teacher, teacher=where))
    model, _ = train(second)
    assert model.collaborate
    before, after = first.state_dict(), model.state_dict()
    linear = {f"{name}.{part}" for name in first.pretrained_cfg["classifier"] for part in ("weight", "bias")}
    assert linear <= before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name not in linear), name
    assert any(
        value.abs().sum() > 0 for name, value in after.items() if name.endswith("classifier.weight") and "embed" in name
    )


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"learn_weights": True}, {}, "'one_for_all' gives the exits' weights no gradient"),
        ({}, {"objective": "independent+ensemble"}, "these exits are not combined in an ensemble"),
        ({"method": "hne", "collaborate": False, "blocks": 2}, {}, "a tree has no last exit"),
        ({**WITH_EXITS, "blocks": 2}, {}, "a tree has no last exit"),
        ({"start": "/nowhere"}, {}, "not a local directory"),
        ({}, {"freeze_levels": 4}, "freeze_levels is 4, but the model has 3 levels"),
        ({"backbone": "hne_resnet50_cifar", "backbone_args": {}}, {}, "use method='hne'"),
    ],
)
def test_what_does_not_combine_is_refused_before_training(tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message):
        train(run(tmp_path, model, **settings))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"collaborate": True}, "method 'hne' has no collaborate"),
        ({"head": "conv", "exit_weights": "uniform"}, "has no exit_weights and no head"),
        ({"exit_average": "probabilities"}, "method 'hne' has no exit_average"),
        ({"boosted": True}, "method 'hne' has no boosted"),
        ({"method": "hne_exits", "learn_weights": True}, "method 'hne_exits' has no learn_weights"),
        ({"method": "multi_exit", "branching": (1, 2)}, "method 'multi_exit' has no branching"),
    ],
)
def test_fields_of_the_other_method_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
