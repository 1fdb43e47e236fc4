"""One more level changes no answer, can be repeated, saved and loaded, and trains apart once symmetry is broken."""

import copy

import pytest
import timm
import torch
from torch import nn

import hierens
from hierens.cutting.cut import CutError
from support.networks import independent_tree, with_statistics

FAMILIES = {
    "resnet10t": {"num_classes": 5, "channels": (8, 16, 24, 32)},
    "mobilenetv2_035": {"num_classes": 5},
    "mobilenetv3_small_050": {"num_classes": 5},
    "vit_tiny_patch16_224": {"num_classes": 5, "depth": 4, "embed_dim": 32, "num_heads": 2},
    "convnext_atto": {"num_classes": 5, "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
}


def logits(model, x, executor="looped", **kwargs):
    model = copy.deepcopy(model)
    model.set_executor(executor)
    with torch.no_grad():
        return model(x, **kwargs)


def check_grown(old, new, x):
    """The laws of growth: twice the leaves, each a copy of its parent; every depth one later, none more expensive."""
    leaves = logits(old, x, reduce=False)
    assert new.tree.branching == (*old.tree.branching, 2) and new.tree.leaves == 2 * old.tree.leaves
    assert leaves.std(0).max() > 1e-3 and (old.tree.leaves == 1 or (leaves[:, 0] - leaves[:, 1]).abs().max() > 1e-4)
    for executor in ("looped", "grouped"):
        grown = logits(new, x, executor, reduce=False)
        assert torch.allclose(grown, leaves.repeat_interleave(2, 1), atol=1e-4), executor
    for depth in range(new.tree.depths):
        before = logits(old, x, depth=max(0, depth - 1))
        assert torch.allclose(logits(new, x, depth=depth), before, atol=1e-5), depth
    size = tuple(x.shape[1:])
    assert new.macs(size)[0] == old.macs(size)[0]
    *_, upper, lower = new.branch_macs(size)
    assert upper + lower == old.branch_macs(size)[-1] and min(upper, lower) > 0


@pytest.mark.sampled
@pytest.mark.parametrize("name", FAMILIES)
def test_growth_is_exact_and_survives_saving(name, tmp_path):
    torch.manual_seed(0)
    size = 224 if "vit" in name else 64
    backbone = with_statistics(timm.create_model(name, **FAMILIES[name]), size)
    old = independent_tree(backbone, blocks=2, seed=3)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    new = old.grow()
    check_grown(old, new, x)
    new.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == new.state_dict().keys()
    assert torch.allclose(logits(loaded, x, reduce=False), logits(new, x, reduce=False), atol=1e-5)


def test_growth_balances_the_last_block():
    model = hierens.hierensify(timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=5), 2)
    *_, upper, lower = model.grow().branch_macs((3, 64, 64))
    assert max(upper, lower) <= 0.6 * (upper + lower)


@pytest.mark.parametrize(
    ("branching", "leaves"), [((1,), None), ((1, 2), None), ((1, 3), None), ((3, 1), None), ((1, 2, 2), 3)]
)
def test_any_tree_grows(small_backbone, small_images, branching, leaves):
    old = independent_tree(small_backbone, branching=branching, leaves=leaves)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    new = old.grow()
    check_grown(old, new, small_images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items()), "weights of its own"


def test_a_tree_grows_again_until_there_is_nothing_to_cut(small_backbone, small_images):
    model = independent_tree(small_backbone, blocks=1)
    expected = logits(model, small_images)
    with pytest.raises(CutError, match="no place left to cut"):
        for _ in range(9):
            model = model.grow()
    assert model.tree.levels >= 4
    assert torch.allclose(logits(model, small_images), expected, atol=1e-5)


def test_growth_after_a_new_classifier(small_backbone, small_images, tmp_path):
    old = independent_tree(small_backbone, blocks=2)
    old.reset_classifier(3)
    new = old.grow()
    check_grown(old, new, small_images)
    new.save_pretrained(tmp_path)
    assert torch.allclose(logits(hierens.from_pretrained(tmp_path), small_images), logits(new, small_images), atol=1e-5)


def test_growth_keeps_how_the_model_runs_and_trains(small_backbone):
    old = hierens.hierensify(small_backbone, 2).train()
    old.set_executor("looped")
    for parameter in old.levels[1].parameters():
        parameter.requires_grad_(False)
    new = old.grow()
    assert new.training and {level.executor for level in new.all_levels()} == {"looped"}
    frozen = {name.split(".")[1] for name, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {"1", "2"}


def test_broken_symmetry_tells_new_siblings_apart_and_leaves_the_first_as_they_were(small_backbone, small_images):
    old = independent_tree(small_backbone, blocks=2)
    assert not old.symmetric
    new = old.grow()
    assert new.symmetric
    new.break_symmetry(0.05, seed=1)
    assert not new.symmetric
    leaves, grown = logits(old, small_images, reduce=False), logits(new, small_images, reduce=False)
    assert torch.allclose(grown[:, ::2], leaves, atol=1e-5)
    assert ((grown[:, 1::2] - leaves).abs().amax((0, 2)) > 1e-4).all()


def test_symmetry_is_seen_between_any_two_leaves(small_backbone):
    model = independent_tree(small_backbone, blocks=2).grow()
    with torch.no_grad():
        model.classifier[0].fc.weight += 1  # the first leaf differs, the last two are still twins
    assert model.symmetric
    with torch.no_grad():
        model.classifier[3].fc.weight += 1
    assert not model.symmetric


def test_networks_that_differ_early_only_are_not_symmetric(small_backbone):
    model = hierens.hierensify(small_backbone, branching=(2, 1, 1))
    assert model.symmetric
    with torch.no_grad():
        next(iter(model.levels[0].parameters()))[:1] += 1
    assert not model.symmetric
