"""Light members in the trainer: learnt, resumed in the same bits, asked for by flags."""

import dataclasses

import pytest
import torch

import hierens
from hierens.training.config import DataConfig, ModelConfig, Run, TrainConfig
from hierens.training.optimizers import create_optimizer
from hierens.training.run import create_ensemble
from support.runs import trainer, weights


def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(tmp_path):
    settings = {"members": ("full", "lora", "rank1"), "rank": 1, "init": "copy", "ema_decay": 0.9, "epochs": 2}
    settings["optimizer"] = "adamw"
    full = trainer(tmp_path / "full", lr=1e-3, **settings)
    before = {name: value.clone() for name, value in full.ensemble.state_dict().items()}
    full.fit()
    first = trainer(tmp_path / "parts", lr=1e-3, **settings)
    first.config = dataclasses.replace(first.config, epochs=1)  # stops after an epoch, the schedule being for two
    first.fit()
    trainer(tmp_path / "parts", lr=1e-3, **settings).fit()
    assert weights(tmp_path / "parts") == weights(tmp_path / "full")
    model = hierens.from_pretrained(tmp_path / "full" / "model")
    assert model.member_kinds == full.ensemble.member_kinds
    after, average = model.state_dict(), hierens.from_pretrained(tmp_path / "full" / "model_ema").state_dict()
    trained = [name for name, value in after.items() if value.is_floating_point()]
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    assert all(not torch.equal(average[name], after[name]) for name in trained)


def test_scales_have_no_weight_decay_and_are_optimised_once(tmp_path):
    model = trainer(tmp_path, members="rank1", init="copy").ensemble
    groups = create_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decayed = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decayed) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decayed[id(parameter)] == (0.1 if name.endswith("weight") and parameter.ndim > 1 else 0), name


def config(**fields):
    small = {"backbone": "resnet8_cifar", "backbone_args": {"channels": (4, 8, 8)}, "blocks": 3}
    return Run(DataConfig(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,)), ModelConfig(**small | fields))


@pytest.mark.parametrize("method", ["hne", "hne_exits"])
def test_flags_make_light_trees(method):
    tree = create_ensemble(config(members=("rank1",), method=method), 2)
    assert tree.arguments()["members"] == "rank1" and tree.symmetric
    mixed = create_ensemble(config(members=("full", "lora", "full"), rank=2, method=method), 2)
    assert mixed.arguments()["members"] == ["full", "lora", "full"] and mixed.arguments()["rank"] == 2


def test_random_signs_are_a_flag(tmp_path):
    model = trainer(tmp_path, members="rank1", symmetry_signs=True, symmetry_noise=0.0).ensemble
    signs = torch.cat([parameter for name, parameter in model.named_parameters() if name.endswith(".s")])
    assert set(signs.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"members": ("rank1", "full")}, "members names 2 kinds, and the tree has 4 levels"),
        ({"members": ("lora",)}, "members 'lora' need a rank"),
        ({"rank": 2}, "rank=2 is for members 'lora'"),
        ({"members": ("rank1",), "method": "multi_exit"}, "method 'multi_exit' has no members"),
    ],
)
def test_flags_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
