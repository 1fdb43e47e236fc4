"""Trees with exits: a backbone's own answer at every network, exits before it, the same by every way."""

import copy
import json

import pytest
import timm
import torch

import hierens
from hierens.core.fetching import LoadError
from hierens.core.predictions import PredictionWeights
from hierens.evaluation.metrics import evaluate_model
from hierens.inference.calibration import calibrate, collect
from hierens.inference.policies import Confidence, FixedDepth
from hierens.objectives import Objective
from support.networks import with_statistics

FAMILIES = {
    "resnet10t": {},
    "mobilenetv2_035": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1)},
}


@pytest.fixture
def model(small_backbone):
    torch.manual_seed(0)
    made = hierens.tree_with_exits(with_statistics(small_backbone, 32), 3, head="conv")
    made.break_symmetry(0.5)
    return made.eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_network_is_the_backbone_and_the_exits_come_before_it(name, images):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=7, **FAMILIES[name]).eval()
    model = hierens.tree_with_exits(backbone, 3)
    assert model.sizes == (1, 2, 3, 4, 6)
    expected, answers = backbone(images), model(images, reduce=False)
    for depth in (2, 3, 4):
        assert torch.allclose(model(images, depth=depth), expected, atol=1e-4)
    assert (answers[:, :2] - expected[:, None]).abs().amax((0, 2)).min() > 1e-3, "exits have heads of their own"
    chain = hierens.multi_exit(backbone, 3)
    for index in range(2):
        chain.exits[index].load_state_dict(model.exits[index].state_dict())
        assert torch.allclose(chain(images, depth=index), model(images, depth=index), atol=1e-4)


@torch.no_grad()
def test_every_way_to_a_depth_gives_the_same(model, small_images):
    answers = model(small_images, reduce=False)
    assert answers.shape[1] == 6 and len(set(answers[0, :, 0].tolist())) == 6, "six different answers"
    expected = [answers[:, 0], answers[:, 1], answers[:, 2], answers[:, 2:4].mean(1), answers[:, 2:].mean(1)]
    steps = list(model.anytime(small_images))
    for depth, size in enumerate(model.sizes):
        wanted = pytest.approx(expected[depth].numpy(), abs=1e-5)
        assert model(small_images, depth=depth).numpy() == wanted
        assert model(small_images, leaves=size).numpy() == wanted
        assert model.prediction_weights(answers)[:, depth].numpy() == wanted
        assert model.prediction_weights.of_first(size)(answers[:, :size])[:, 0].numpy() == wanted
        assert steps[size - 1].logits.numpy() == wanted and steps[size - 1].macs == model.macs()[depth]
        assert torch.allclose(steps[size - 1].newest, answers[:, size - 1], atol=1e-5)
        small = model.at_depth(depth)
        assert small(small_images).numpy() == wanted and small.macs() == model.macs()[: depth + 1]
        assert isinstance(small, hierens.MultiExit if depth < 2 else hierens.TreeWithExits)
        assert sum(p.numel() for p in small.parameters()) == model.parameter_counts()[depth]
        assert small.parameter_counts() == model.parameter_counts()[: depth + 1]
    assert list(model.macs()) == sorted(set(model.macs()))
    assert torch.allclose(model.networks(small_images), expected[-1], atol=1e-5)


@torch.no_grad()
def test_nothing_behind_an_exit_is_run(model, small_images):
    expected = model(small_images, depth=1)
    tree = model.networks
    for part in (tree.levels[2], tree.head, tree.classifier):
        for parameter in part.parameters():
            parameter.fill_(float("nan"))
    for parameter in tree.levels[1][1].parameters():
        parameter.fill_(float("nan"))
    assert torch.equal(model(small_images, depth=1), expected)


def test_images_can_leave_an_anytime_walk(model):
    images = 3 * torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    walk, kept = model.anytime(images), torch.tensor([0, 3, 4, 11])
    next(walk)
    step = walk.send(kept)
    assert torch.allclose(step.logits, model(images[kept], depth=1), atol=1e-5)
    step = walk.send(torch.tensor([1, 2]))
    assert torch.allclose(step.logits, model(images[3:5], depth=2), atol=1e-5)
    step = walk.send(torch.tensor([0]))
    assert torch.allclose(step.logits, model(images[3:4], depth=3), atol=1e-5)


@torch.no_grad()
def test_policies_calibration_and_metrics_take_it(model):
    images = 3 * torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(-1)
    result = evaluate_model(model, [(images, labels)])
    assert len(result.accuracy) == 5 and result.accuracy[-1] == 100 and len(result.leaf_accuracy) == 6
    assert result.accuracy[:3] == result.leaf_accuracy[:3]
    found = FixedDepth(1)(model, images)
    assert torch.allclose(found.logits, model(images, depth=1), atol=1e-5)
    answers = collect(model, [(images, labels)])
    policy = calibrate(model, answers, sum(model.macs()[1:3]) / 2)
    assert isinstance(policy, Confidence)
    found, sure = policy(model, images), answers.certainties(policy.measure)
    for image in range(24):
        left = next((depth for depth in range(4) if sure[image, depth] >= policy.thresholds[depth]), 4)
        assert found.macs[image] == model.macs()[left] and found.leaves[image] == model.sizes[left]
    assert "exits and networks" in str(model.profile())


@torch.no_grad()
def test_sub_models_inherit_the_image_description(model, small_images, tmp_path):
    model.pretrained_cfg.update(input_size=(1, 28, 28), mean=(0.25,), label_names=list("abcdefghij"))
    assert model.macs() == model.macs((1, 28, 28)) != model.macs((1, 32, 32))
    assert model.macs()[-1] == model.networks.macs()[-1] + sum(model.exit_macs())
    for depth in (0, 3):
        part = model.at_depth(depth)
        assert part.macs() == model.macs()[: depth + 1] and part.pretrained_cfg["mean"] == (0.25,)
        part.save_pretrained(tmp_path)
        assert hierens.from_pretrained(tmp_path).pretrained_cfg["label_names"] == list("abcdefghij")
    tree = model.networks
    assert tree.pretrained_cfg["mean"] == (0.25,) and tree.pretrained_cfg["architecture"] == "hne"
    tree.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    assert isinstance(loaded, hierens.HierarchicalEnsemble) and loaded.macs() == loaded.macs((1, 28, 28))
    assert torch.allclose(loaded(small_images), model(small_images), atol=1e-5)


@torch.no_grad()
def test_some_of_its_networks_may_be_left_out(small_backbone, small_images):
    model = hierens.tree_with_exits(small_backbone, 3, leaves=3, seed=5).eval()
    again = hierens.tree_with_exits(small_backbone, 3, leaves=3, seed=5).eval()
    assert model.sizes == (1, 2, 3, 4, 5)
    assert torch.equal(model(small_images, reduce=False), again(small_images, reduce=False)), "the seed's heads"
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert copied(small_images.bfloat16(), depth=4).shape == (len(small_images), 10)
    made = timm.create_model("multi_exit", **model.at_depth(1).arguments())
    assert made.sizes == (1, 2), "arguments() make the model again"


def test_losses_take_its_prediction_weights(model, small_images):
    """Every exit and network learns the labels; every depth below the last learns from all networks."""
    answers, labels = model(small_images, reduce=False).double().detach(), torch.arange(len(small_images))
    objective = Objective("independent+hierarchical_codistillation", alpha=0.25, temperature=2.0)
    found = objective(answers, labels, prediction_weights=model.prediction_weights)
    log_p = torch.log_softmax(answers, -1)
    supervised = -log_p[torch.arange(len(labels)), :, labels].sum(1).mean()
    nested = [answers[:, 0], answers[:, 1], answers[:, 2], answers[:, 2:4].mean(1)]
    soft = torch.softmax(answers[:, 2:].mean(1) / 2, -1)
    distilled = -sum((soft * torch.log_softmax(y, -1)).sum(-1).mean() for y in nested)
    assert found.item() == pytest.approx((0.75 * supervised + 0.25 * distilled).item(), rel=1e-10)
    assert PredictionWeights((1, 2, 3), num_exits=2).has_ensembles
    assert not PredictionWeights((1, 2, 3), num_exits=3).has_ensembles


def test_training_reaches_every_part(model, small_images):
    model.train()
    model(small_images, reduce=False).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(small_images, reduce=False).square().sum().backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-4) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("depth", [0, 1, 3, 4])
@torch.no_grad()
def test_saved_models_come_back_by_every_way_in(model, small_images, tmp_path, depth):
    part = model.at_depth(depth)
    part.save_pretrained(tmp_path, results={"accuracy (%)": [90.0] * part.depths})
    assert "exits" in (tmp_path / "README.md").read_text()
    for loaded in (
        hierens.from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert type(loaded) is type(part) and loaded.sizes == model.sizes[: depth + 1]
        for at in range(depth + 1):
            assert torch.allclose(loaded(small_images, depth=at), model(small_images, depth=at), atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | {"head": "x"}}))
    with pytest.raises(LoadError, match="head must be 'pool' or 'conv'"):
        hierens.from_pretrained(tmp_path)


@torch.no_grad()
def test_new_classifiers_for_all(model, small_images):
    model.reset_classifier(4)
    assert model(small_images, reduce=False).shape[1:] == (6, 4)
    assert set(model.pretrained_cfg["classifier"]) <= {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert model.pretrained_cfg["first_conv"] in dict(model.named_modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: hierens.tree_with_exits(b, 1), "needs blocks=2 at least"),
        (lambda b: hierens.tree_with_exits(b, at=["layer2"], branching=(1, 2, 2)), "branching has 3 levels"),
        (lambda b: hierens.tree_with_exits(b, 3, head="mlp"), "head must be 'pool' or 'conv'"),
        (lambda b: hierens.tree_with_exits(b, 3)(torch.zeros(1, 1, 32, 32), depth=5), "depth must be from 0 to 4"),
        (lambda b: hierens.tree_with_exits(b, 3)(torch.zeros(1, 3, 32, 32)), r"expected images \(N, 1, H, W\)"),
        (lambda b: hierens.tree_with_exits(b, 3).anytime(torch.zeros(1, 3, 32, 32)), "expected images"),
        (lambda b: hierens.multi_exit(b, 3).anytime(torch.zeros(1, 3, 32, 32)), "expected images"),
        (lambda b: hierens.hierensify(b, 3).anytime(torch.zeros(1, 3, 32, 32)), "expected images"),
        (lambda b: hierens.tree_with_exits(b, at=[]), "needs blocks=2 at least"),
        (
            lambda b: Objective("one_for_all")(
                torch.zeros(1, 6, 10),
                torch.tensor([1]),
                prediction_weights=hierens.tree_with_exits(b, 3).prediction_weights,
            ),
            "a tree has no last exit",
        ),
        (lambda b: hierens.tree_with_exits(b, 3).reset_classifier(0), "exits need one class or more"),
    ],
)
def test_bad_requests_are_named(small_backbone, call, message):
    with pytest.raises(ValueError, match=message):
        call(small_backbone)
