"""The tree against its laws: exact copies, grouped equal to looped, every activation once, cost by the arithmetic."""

import copy
from collections import Counter

import pytest
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch.utils.flop_counter import FlopCounterMode

import hierens
from hierens.core.modes import quiet_dropout
from hierens.core.tree import Tree
from hierens.models.level_tree import BRANCH_PREFIX
from support.networks import independent_tree

EXECUTORS = ("looped", "grouped")


def test_copies_equal_the_backbone_everywhere(backbone, copies, images):
    model = copies
    with torch.no_grad():
        expected = backbone(images)
        assert expected.std() > 0.05, "the backbone must answer with something for this test to mean anything"
        for executor in (*EXECUTORS, "auto"):
            model.set_executor(executor)
            for depth in range(4):
                assert torch.allclose(model(images, depth=depth), expected, atol=1e-4), (executor, depth)
            for leaves in range(1, 9):
                assert torch.allclose(model(images, leaves=leaves), expected, atol=1e-4), (executor, leaves)
    assert model.looped == {}, "every block of these families has a grouped form"


def test_grouped_equals_looped_in_evaluation(backbone, independent, images):
    model = independent
    outputs = {}
    for executor in EXECUTORS:
        model.set_executor(executor)
        with torch.no_grad():
            outputs[executor] = [model(images, leaves=n, reduce=False) for n in range(1, 5)]
    for n, (looped, grouped) in enumerate(zip(*outputs.values(), strict=True), start=1):
        assert looped.shape == (3, n, backbone.num_classes)
        assert (looped - grouped).abs().max() < 1e-4 * max(1, looped.std()), n
        assert n == 1 or (looped[:, 0] - looped[:, 1]).abs().max() > 1e-3, "branches must be independent"


def test_grouped_equals_looped_in_training(independent, images):
    results = {}
    model = independent.double().train()
    quiet_dropout(model)
    for executor in EXECUTORS:
        trained = copy.deepcopy(model)
        trained.set_executor(executor)
        logits = trained(images.double(), leaves=3, reduce=False)
        logits.square().mean().backward()
        statistics = dict(trained.named_buffers())
        gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        results[executor] = ({"logits": logits.detach()}, statistics, gradients)
    moved = [n for n, b in model.named_buffers() if not torch.equal(b, results["looped"][1][n])]
    assert moved, "training must move running statistics"
    for looped, grouped in zip(*results.values(), strict=True):
        assert looped.keys() == grouped.keys()
        for name, expected in looped.items():
            scale = 1 + expected.double().abs().max()
            assert (grouped[name].double() - expected.double()).abs().max() < 1e-6 * scale, name


def test_deepcopies_are_apart(small_copies, small_images):
    model = small_copies
    twin = copy.deepcopy(model)
    for executor in EXECUTORS:
        twin.set_executor(executor)
        with torch.no_grad():
            before = twin(small_images)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(twin(small_images), before) and before.abs().max() > 0
            for parameter in twin.parameters():
                parameter.mul_(1.1)
            assert not torch.equal(twin(small_images), before), "the executor must read the twin's own weights"


@pytest.mark.parametrize("branching", [(1, 2, 2), (1, 3, 2), (1, 1, 4), (4, 1, 1), (2, 2, 1)])
def test_anytime_yields_forwards_logits_and_runs_each_branch_once(small_backbone, small_images, branching):
    model = independent_tree(small_backbone, branching=branching)
    model.set_executor("looped")
    model.macs((1, 32, 32))
    calls = Counter()
    for index, level in enumerate(model.all_levels()):
        for branch in level:
            branch.register_forward_hook(lambda *_, index=index: calls.update([index]))
    steps = list(model.anytime(small_images))
    leaves = model.tree.leaves
    assert [calls[i] for i in range(len(model.all_levels()))] == [*model.tree.widths(), leaves, leaves]
    with torch.no_grad():
        for step in steps:
            assert torch.allclose(step.logits, model(small_images, leaves=step.leaves), atol=1e-5)
    costs = model.branch_macs((1, 32, 32))
    assert [step.macs for step in steps] == [model.tree.cost(costs, n) for n in range(1, leaves + 1)]


def test_anytime_can_stop_early(small_copies, small_images):
    model = small_copies
    model.macs((1, 32, 32))
    calls = Counter()
    for index, level in enumerate(model.all_levels()):
        for branch in level:
            branch.register_forward_hook(lambda *_, index=index: calls.update([index]))
    next(model.anytime(small_images))
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_measured_macs_follow_the_arithmetic(backbone, copies, images, executor):
    model = copies
    model.set_executor(executor)
    claimed = model.macs((3, 64, 64))
    branch = model.branch_macs((3, 64, 64))
    for depth in range(4):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images[:1], depth=depth)
        widths = [max(1, 2 ** (level - (3 - depth))) for level in range(4)]
        assert claimed[depth] == sum(w * c for w, c in zip(widths, branch, strict=True))
        assert counter.get_total_flops() // 2 == claimed[depth]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(images[:1])
    assert claimed[0] == counter.get_total_flops() // 2


def test_at_depth_keeps_its_own_sub_tree_only(backbone, independent, images):
    model = independent
    for depth in range(3):
        small = model.at_depth(depth)
        assert sum(p.numel() for p in small.parameters()) == model.parameter_counts()[depth]
        with torch.no_grad():
            assert torch.allclose(small(images), model(images, depth=depth), atol=1e-5)
    ordinary = model.at_depth(0)
    shapes = {BRANCH_PREFIX.sub("", name): p.shape for name, p in ordinary.state_dict().items()}
    assert shapes == {name: p.shape for name, p in backbone.state_dict().items()}
    kept = {t.data_ptr() for t in model.state_dict().values()}
    assert all(t.data_ptr() not in kept for t in small.state_dict().values())


def test_any_number_of_leaves_can_be_kept(small_independent, small_images):
    model = small_independent
    with torch.no_grad():
        odd = model.at_depth(leaves=3)
        assert odd.tree.widths() == (1, 2, 3)
        assert torch.allclose(odd(small_images), model(small_images, leaves=3), atol=1e-6)
        assert torch.allclose(odd.at_depth(1)(small_images), model(small_images, leaves=2), atol=1e-6)


def test_the_state_dict_does_not_depend_on_the_executor(small_independent, small_images):
    model = small_independent.train()
    names = {}
    for executor in EXECUTORS:
        model.set_executor(executor)
        model(small_images)
        names[executor] = list(model.state_dict())
    assert names["looped"] == names["grouped"]
    assert not any("grouped" in name for name in names["looped"])
    assert model.state_dict()["levels.2.3.layer3.0.conv1.weight"].shape[0] == 16


def test_reinit_is_seeded_and_independent(small_backbone):
    first, second, third = (hierens.hierensify(small_backbone, 3, init="reinit", seed=s) for s in (1, 1, 2))
    name = "levels.2.0.layer3.0.conv1.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], third.state_dict()[name])
    branches = torch.stack(
        [branch.get_parameter("layer3.0.conv1.weight").detach() for branch in first.levels[2]]
    ).flatten(1)
    assert torch.linalg.matrix_rank(branches) == 4, "four branches, four draws"
    own = branches.std(1) / small_backbone.layer3[0].conv1.weight.std()
    assert ((own > 0.8) & (own < 1.25)).all(), "drawn by the backbone's own initialisation"


def test_the_backbone_is_left_alone(small_backbone, small_images):
    before = {name: t.clone() for name, t in small_backbone.state_dict().items()}
    model = hierens.hierensify(small_backbone.train(), 3)
    assert small_backbone.training and model.training
    model(small_images).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in small_backbone.state_dict().items())
    assert all(p.grad is None for p in small_backbone.parameters())


def test_symmetry_breaks_reproducibly_and_leaves_the_first_network_alone(small_backbone, small_images):
    models = [hierens.hierensify(small_backbone, 3) for _ in range(2)]
    assert models[0].symmetric
    with torch.no_grad():
        before = models[0](small_images, depth=0)
        for model in models:
            model.break_symmetry(0.05, seed=7)
        leaves = models[0](small_images, reduce=False)
    assert not models[0].symmetric
    assert torch.allclose(leaves[:, 0], before, atol=1e-6)
    assert all((leaves[:, a] - leaves[:, b]).abs().max() > 1e-4 for a in range(4) for b in range(a))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_generalised_trees(small_backbone, small_images):
    expected = small_backbone(small_images)
    for branching in ([1, 4, 1], [4, 1, 1], [1, 1, 6]):
        model = hierens.hierensify(small_backbone, branching=branching)
        assert model.tree == Tree(tuple(branching))
        for executor in EXECUTORS:
            model.set_executor(executor)
            for leaves in range(1, model.tree.leaves + 1):
                assert torch.allclose(model(small_images, leaves=leaves), expected, atol=1e-5)


@pytest.mark.parametrize("branching", [(1, 4, 1, 2), (1, 1, 1, 8), (8, 1, 1, 1)])
def test_other_ways_to_share_obey_the_same_laws(small_backbone, small_images, branching):
    """The paper's comparison of sharing schemes (figure 5), and a tree of uneven branching."""
    size, expected = (1, 32, 32), small_backbone(small_images)
    copies = hierens.hierensify(small_backbone, branching=branching)
    apart = independent_tree(small_backbone, branching=branching)
    branch = copies.branch_macs(size)
    widths = {(1, 4, 1, 2): (1, 4, 4, 8), (1, 1, 1, 8): (1, 1, 1, 8), (8, 1, 1, 1): (8, 8, 8, 8)}[branching]
    assert copies.macs(size)[-1] == sum(w * c for w, c in zip(widths, branch, strict=True))
    outputs = []
    for executor in EXECUTORS:
        copies.set_executor(executor)
        apart.set_executor(executor)
        with torch.no_grad():
            for depth, macs in enumerate(copies.macs(size)):
                assert torch.allclose(copies(small_images, depth=depth), expected, atol=1e-5)
                with FlopCounterMode(display=False) as counter:
                    copies(small_images[:1], depth=depth)
                assert counter.get_total_flops() // 2 == macs, (executor, depth)
            outputs.append(apart(small_images, reduce=False))
    assert torch.allclose(*outputs, atol=1e-4) and outputs[0].std(1).min() > 1e-3
    for step in apart.anytime(small_images):
        assert torch.allclose(step.logits, outputs[0][:, : step.leaves].mean(1), atol=1e-4)


def test_leaves_are_dropped_from_the_end(small_independent, small_images):
    model = small_independent
    with torch.no_grad():
        for count in range(4):
            small = model.drop_leaves(count)
            assert small.tree.leaves == 4 - count
            assert torch.allclose(small(small_images), model(small_images, leaves=4 - count), atol=1e-5)


def test_gradient_checkpointing_changes_nothing(small_backbone, small_images):
    results = []
    for enable in (False, True):
        model = hierens.hierensify(small_backbone, 3).train()
        model.set_grad_checkpointing(enable)
        model(small_images, reduce=False).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in zip(*results, strict=True))


def test_timms_tools_work(small_copies, small_images):
    model = small_copies
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 32, 32)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    backbone_decayed = sum(p.ndim > 1 for p in model.parameters())
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert len(decayed) == backbone_decayed
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) >= 4 and max(scales) == 1.0
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    before = ema.module.state_dict()["classifier.0.fc.weight"].clone()
    torch.nn.init.zeros_(model.get_classifier()[0].weight)
    ema.update(model)
    assert torch.allclose(ema.module.get_classifier()[0].weight, before / 2)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=3)
    scheduler.step(1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_features_and_head_compose(backbone, independent, images, executor):
    model = independent
    model.set_executor(executor)
    with torch.no_grad():
        features = model.forward_features(images, leaves=3)
        assert features.shape[:2] == (3, 3)
        assert torch.allclose(model.forward_head(features), model(images, leaves=3), atol=1e-5)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == backbone.forward_head(backbone.forward_features(images), pre_logits=True).shape


def test_classifiers_are_reset_per_leaf(small_copies, small_images):
    model = small_copies.eval()
    features = model.forward_head(model.forward_features(small_images), pre_logits=True)
    model.reset_classifier(5)
    assert model.num_classes == 5
    outputs = {}
    for executor in EXECUTORS:
        model.set_executor(executor)
        outputs[executor] = model(small_images, reduce=False)
    assert outputs["looped"].shape == (4, 4, 5)
    assert torch.allclose(*outputs.values(), atol=1e-6)
    assert not torch.allclose(outputs["looped"][:, 0], outputs["looped"][:, 1], atol=1e-3)
    model.reset_classifier(0)
    assert torch.allclose(model(small_images), features, atol=1e-6)
    model.reset_classifier(3)
    assert model(small_images).shape == (4, 3)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, global_pool="max")


def test_half_precision_runs_both_ways(small_copies, small_images):
    model = small_copies.bfloat16().eval()
    outputs = []
    for executor in EXECUTORS:
        model.set_executor(executor)
        outputs.append(model(small_images.bfloat16()).float())
    assert torch.allclose(*outputs, atol=0.1) and outputs[0].std() > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b, x: m(x, depth=3), "depth must be from 0 to 2"),
        (lambda m, b, x: m(x, depth=-1), "depth must be from 0 to 2"),
        (lambda m, b, x: m(x, leaves=5), "leaves must be from 1 to 4"),
        (lambda m, b, x: m(x, leaves=0), "leaves must be from 1 to 4"),
        (lambda m, b, x: m(x, depth=1, leaves=1), "not both"),
        (lambda m, b, x: m(x.repeat(1, 3, 1, 1)), r"expected images \(N, 1, H, W\).*\(4, 3, 32, 32\)"),
        (lambda m, b, x: m(x[0]), r"expected images \(N, 1, H, W\)"),
        (lambda m, b, x: next(m.anytime(x[:, :0])), "expected images"),
        (lambda m, b, x: m.at_depth(4), "depth must be from 0 to 2"),
        (lambda m, b, x: m.drop_leaves(4), "from 0 to 3 leaves can be dropped, got 4"),
        (lambda m, b, x: m.drop_leaves(-1), "from 0 to 3 leaves can be dropped, got -1"),
        (lambda m, b, x: m.set_executor("fast"), "executor must be .* got 'fast'"),
        (lambda m, b, x: hierens.hierensify(b, 0), "blocks must be at least 1, got 0"),
        (lambda m, b, x: hierens.hierensify(b, -2), "blocks must be at least 1, got -2"),
        (lambda m, b, x: hierens.hierensify(b, 40), "blocks=40 is more than this CifarResNet can be cut into: [0-9]+"),
        (lambda m, b, x: hierens.hierensify(b, 3, init="zeros"), "init must be .* got 'zeros'"),
        (lambda m, b, x: hierens.hierensify(b, at=["layer3", "layer2"]), "in the order"),
        (lambda m, b, x: hierens.hierensify(b, at=["nowhere"]), "no module named 'nowhere'"),
        (lambda m, b, x: hierens.hierensify(b, at=["layer2"], branching=[1, 2, 2]), "branching has 3 levels"),
        (lambda m, b, x: hierens.hierensify(b, 3, leaves=9), "leaves must be from 1 to 4"),
        (lambda m, b, x: hierens.hierensify(torch.nn.Sequential(torch.nn.Linear(2, 2)), 1), "not a timm model"),
    ],
)
def test_bad_input_says_what_is_allowed(small_backbone, small_copies, small_images, call, message):
    model = small_copies
    with pytest.raises(ValueError, match=message):
        call(model, small_backbone, small_images)
