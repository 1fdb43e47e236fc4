"""What all networks whose depth can be chosen do alike: no images get no answers, and a print begins with costs."""

import copy

import pytest
import timm
import torch

import hierens
from hierens.evaluation.metrics import LeafMetrics, evaluate_model
from hierens.evaluation.profiling import millions
from hierens.evaluation.uncertainty import MEASURES
from hierens.inference.policies import Confidence, Deadline, FixedDepth, Load
from hierens.losses import distillation
from hierens.objectives import TERMS, Objective

# Of the second one not even the backbone takes an empty batch.
BACKBONES = {"resnet8_cifar": {"channels": (8, 8, 16)}, "test_vit": {"num_classes": 10, "img_size": 32}}
MAKERS = {
    "tree": lambda backbone: hierens.hierensify(backbone, 3),
    "fused": lambda backbone: hierens.hierensify(backbone, 3).fuse(),
    "multi-exit": lambda backbone: hierens.multi_exit(backbone, 3),
    "weighted": lambda backbone: hierens.multi_exit(backbone, 3, weights="uniform", collaborate=True),
    "tree with exits": lambda backbone: hierens.tree_with_exits(backbone, 3),
}
NONE = torch.zeros(0, 3, 32, 32)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    return timm.create_model(request.param, **BACKBONES[request.param]).eval()


@pytest.fixture(scope="module", params=MAKERS)
def model(request, backbone):
    return MAKERS[request.param](backbone)


@pytest.mark.parametrize("executor", ["auto", "looped", "grouped"])
@pytest.mark.parametrize("gradients", [True, False])
def test_empty_batches_give_empty_outputs_at_every_depth(model, executor, gradients):
    if hasattr(model, "set_executor"):
        model.set_executor(executor)
    with torch.set_grad_enabled(gradients):
        for depth, leaves in enumerate(model.sizes):
            assert model(NONE, depth=depth).shape == (0, 10)
            assert model(NONE, depth=depth, reduce=False).shape == (0, leaves, 10)
        steps = list(model.anytime(NONE))
    assert [step.leaves for step in steps] == list(range(1, model.leaves + 1))
    assert all(step.logits.shape == step.newest.shape == (0, 10) for step in steps)
    assert [step.macs for step in steps if step.leaves in model.sizes] == list(model.macs((3, 32, 32)))
    with pytest.raises(ValueError, match="expected images"):
        model(torch.zeros(0, 5, 32, 32))
    with pytest.raises(ValueError, match="depth must be from 0"):
        model(NONE, depth=9)


@pytest.mark.parametrize(
    "policy",
    [FixedDepth(0), Deadline(1000), Deadline(0.001), Load(1), *(Confidence((0.5,), measure) for measure in MEASURES)],
)
def test_policies_give_empty_outputs_for_empty_batches(model, policy):
    found = policy(model, NONE)
    assert found.logits.shape == (0, 10) and found.leaves.shape == found.macs.shape == (0,)


def test_a_model_without_classifier_gives_empty_features_for_empty_batches(small_copies):
    tree = small_copies
    tree.reset_classifier(0)
    assert tree(torch.zeros(0, 1, 32, 32)).shape == (0, tree(torch.zeros(1, 1, 32, 32)).shape[1])


def test_features_and_head_accept_empty_batches_with_either_executor(small_copies):
    tree = small_copies
    for executor in ("looped", "grouped"):
        tree.set_executor(executor)
        features = tree.forward_features(torch.zeros(0, 1, 32, 32))
        assert features.shape[:2] == (0, 4) and tree.forward_head(features).shape == (0, 10)


def test_metrics_skip_empty_batches_and_losses_refuse_them(small_copies, small_images):
    tree, targets, none = small_copies, torch.tensor([0, 1, 2, 3]), torch.zeros(0).long()
    batches = [(small_images, targets), (small_images[:0], none)]
    assert evaluate_model(tree, batches) == evaluate_model(tree, batches[:1])
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        evaluate_model(tree, batches[1:])
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        LeafMetrics().compute()
    logits = tree(small_images[:0], reduce=False)
    for name in (*(f"independent+{term}" for term in TERMS[1:]), "one_for_all"):
        with pytest.raises(ValueError, match="there is no image in the batch"):
            Objective(name)(logits, none)
    with pytest.raises(ValueError, match="there is no image in the batch"):
        distillation(logits, torch.zeros(0, 10))


def test_a_print_begins_with_the_cost_of_every_depth(model):
    model = copy.deepcopy(model)
    if hasattr(model, "set_executor"):
        model.set_executor("auto")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines = repr(copy.deepcopy(model)).splitlines()
    for line, depth in zip(lines[3:], range(model.depths), strict=False):
        cells = [cell.strip() for cell in line.strip(" |").split("|")]
        costs = (model.macs()[depth], model.parameter_counts()[depth])
        assert cells == [f"{depth}", f"{model.sizes[depth]}", *map(millions, costs)]
    assert lines[0] == f"{type(model).__name__}(" and lines[1].split("|")[2].strip() == model.unit
    assert repr(model).splitlines()[:5] == lines[:5]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if not isinstance(model, hierens.MultiExit):
        assert lines[3 + model.depths].strip() == "executor: auto"


def test_every_model_can_be_printed(small_copies):
    tree = small_copies
    expected = repr(tree)
    assert repr(copy.deepcopy(tree).to("meta")) == expected
    tree.level(2).loop("of a reason")
    tree.set_executor("looped")
    assert "executor: looped\n  level 2 is looped: of a reason\n" in repr(tree)
    tree.pretrained_cfg["input_size"] = (3, 32, 32)
    assert "unknown" in repr(tree) and "(levels): ModuleList(" in repr(tree)
    del tree.tree
    assert repr(tree).startswith("HierarchicalEnsemble(\n  (levels): ModuleList(")
