"""Multi-exit networks: exact at the last exit, the same by every way, for every family of backbones."""

import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import hierens
from hierens.core.fetching import LoadError
from hierens.evaluation.metrics import evaluate_model
from hierens.evaluation.uncertainty import MEASURES
from hierens.inference.calibration import calibrate, collect
from hierens.inference.policies import Confidence, Deadline, FixedDepth, Load
from support.networks import with_statistics

BACKBONES = {
    "resnet10t": ("NCHW", {}),
    "mobilenetv2_035": ("NCHW", {}),
    "efficientnet_b0": ("NCHW", {}),
    "convnext_atto": ("NCHW", {}),
    "regnetx_002": ("NCHW", {}),
    "vit_tiny_patch16_224": ("NLC", {"img_size": 64, "depth": 4}),
    "swin_tiny_patch4_window7_224": ("NHWC", {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1)}),
}


@pytest.fixture(params=BACKBONES)
def family(request):
    torch.manual_seed(0)
    layout, args = BACKBONES[request.param]
    return timm.create_model(request.param, num_classes=7, **args).eval(), layout


def disturbed(model, seed=1):
    """Weights of its own for what would be silent at first."""
    torch.manual_seed(seed)
    for embedding in model.embeddings:
        torch.nn.init.normal_(embedding.classifier.weight, std=0.3)
    return model.eval()


@pytest.fixture
def model(small_backbone):
    return disturbed(hierens.multi_exit(small_backbone, 3, collaborate=True, weights="linear_rising"))


@pytest.fixture
def plain(small_backbone):
    return hierens.multi_exit(small_backbone, 3).eval()


@torch.no_grad()
def test_the_last_exit_is_the_backbone_and_the_others_read_its_layout(family, images):
    backbone, layout = family
    model = hierens.multi_exit(backbone, 3, collaborate=True)
    assert torch.equal(model(images), backbone(images))
    assert [exit.layout.kind for exit in model.exits[:-1]] == [layout] * 2
    answers = model(images, reduce=False)
    assert answers.shape == (3, 3, 7) and answers.isfinite().all()
    assert (answers[0] - answers[1]).abs().amax(-1).min() > 0, "every exit sees the image"
    for depth, step in enumerate(model.anytime(images)):
        assert torch.equal(step.logits, model(images, depth=depth)) and torch.equal(step.logits, answers[:, depth])
        assert step.macs == model.macs((3, 64, 64))[depth]
    assert model.train()(images).shape == (3, 7)


def test_a_class_token_speaks_for_the_image_where_the_backbone_has_it_so():
    args = {"num_classes": 3, "img_size": 32, "depth": 2}
    by_token = hierens.multi_exit(timm.create_model("vit_tiny_patch16_224", **args), 2).exits[0].layout
    averaged = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **args)
    layout = hierens.multi_exit(averaged, 2).exits[0].layout
    assert (by_token.class_token, by_token.prefix, layout.class_token, layout.prefix) == (True, 1, False, 1)
    tokens = torch.arange(10.0).view(1, 5, 2)
    assert by_token.pooled(tokens).tolist() == [[0.0, 1.0]] and layout.pooled(tokens).tolist() == [[5.0, 6.0]]


def test_the_layout_is_found_with_as_many_channels_as_positions():
    backbone = timm.create_model("resnet8_cifar", channels=(16, 16, 8), in_chans=1)  # 16 channels of 16x16 positions
    model = hierens.multi_exit(backbone, at=["layer3"])
    assert model.exits[0].layout.kind == "NCHW" and model.exits[0].layout.channels == 16


def test_sizes_and_tables_may_cross_beside_the_features(images):
    """XCiT hands on the numbers of rows and columns with its tokens: the exits stand among its blocks all the same."""
    backbone = timm.create_model("xcit_nano_12_p16_224", num_classes=3, img_size=64).eval()
    model = hierens.multi_exit(backbone, 2)
    layout = model.exits[0].layout
    assert layout.kind == "NLC" and layout.part is not None and layout.prefix == 0 and not layout.class_token
    macs = model.macs((3, 64, 64))
    assert 0.35 < macs[0] / macs[1] < 0.65 and torch.equal(model(images), backbone(images))
    step = next(model.anytime(images))
    assert torch.equal(step.logits, model(images, depth=0))


def test_features_that_no_head_can_read_are_refused(small_backbone):
    with pytest.raises(ValueError, match="2 feature tensors cross after block 0, and an exit reads one"):
        hierens.multi_exit(small_backbone, at=["layer2.0.conv2"])
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match="head='conv' takes maps"):
        hierens.multi_exit(vit, 2, head="conv")


@torch.no_grad()
def test_every_way_to_a_depth_gives_the_same(model, small_images):
    answers = model(small_images, reduce=False)
    weights = torch.tensor([1.0, 2.0, 3.0])
    for depth in range(3):
        expected = (answers[:, : depth + 1] * weights[: depth + 1, None]).sum(1) / weights[: depth + 1].sum()
        assert torch.allclose(model(small_images, depth=depth), expected, atol=1e-5)
        assert torch.allclose(model.prediction_weights(answers)[:, depth], expected, atol=1e-5)
        assert torch.equal(model(small_images, leaves=depth + 1), model(small_images, depth=depth))
        small = model.at_depth(depth)
        assert torch.allclose(small(small_images), expected, atol=1e-5)
        assert small.macs() == model.macs()[: depth + 1]
        assert sum(p.numel() for p in small.parameters()) == small.parameter_counts()[-1]
        assert small.parameter_counts() == model.parameter_counts()[: depth + 1]


@torch.no_grad()
def test_nothing_behind_an_exit_is_run(model, small_images):
    expected = model(small_images, depth=1)
    for part in (model.levels[2], model.exits[2], model.embeddings[1]):
        for parameter in part.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(model(small_images, depth=1), expected)


@torch.no_grad()
def test_a_collaborating_exit_adds_the_embedded_logits_of_the_previous_exit(small_backbone, small_images):
    without = hierens.multi_exit(small_backbone, 3).eval()
    torch.manual_seed(3)
    model = without.with_collaboration()
    assert torch.equal(model(small_images, reduce=False), without(small_images, reduce=False)), "silent at first"
    disturbed(model)
    answers, before = model(small_images, reduce=False), None
    alone = without(small_images, reduce=False)
    for index in range(3):
        expected = alone[:, index] + (0 if before is None else model.embeddings[index - 1](before))
        assert torch.allclose(answers[:, index], expected, atol=1e-5)
        before = answers[:, index]
    assert (answers[:, 1:] - alone[:, 1:]).abs().max() > 0.01


def test_boosted_exits_add_the_logits_before_and_learn_what_is_missing(small_backbone, small_images, tmp_path):
    model, twin = (hierens.multi_exit(small_backbone, 3, head="conv", boosted=on).eval() for on in (True, False))
    with torch.no_grad():
        assert torch.equal(model(small_images), small_backbone(small_images)), "exact at first"
    twin.load_state_dict(model.state_dict())
    for exit in (*model.exits[:2], *twin.exits[:2]):
        torch.nn.init.normal_(exit.classifier.weight, generator=torch.Generator().manual_seed(3))
    alone = twin(small_images, reduce=False)
    logits = model(small_images, reduce=False)
    assert torch.allclose(logits, alone.cumsum(1), atol=1e-5)
    small = model.at_depth(1)
    assert torch.equal(small(small_images), logits[:, 1])
    logits[:, 2].square().sum().backward()
    assert not any(parameter.grad.any() for parameter in model.exits[:2].parameters())
    assert next(model.levels.parameters()).grad.any()
    model.reset_classifier(4)
    model.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    assert loaded.boosted and torch.allclose(loaded(small_images), model(small_images), atol=1e-5)


def test_a_sum_of_two_classifiers_is_one_of_both():
    """Why the embedding's logits may be added: the paper's concatenation, written out."""
    features, embedding = torch.randn(5, 6), torch.randn(5, 4)
    one, other = torch.nn.Linear(6, 3), torch.nn.Linear(4, 3, bias=False)
    joined = torch.nn.functional.linear(
        torch.cat([features, embedding], 1), torch.cat([one.weight, other.weight], 1), one.bias
    )
    assert torch.allclose(one(features) + other(embedding), joined, atol=1e-6)


def test_images_can_leave_an_anytime_walk(model):
    images = 3 * torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    walk, kept = model.anytime(images), torch.tensor([0, 3, 4, 11])
    next(walk)
    step = walk.send(kept)
    assert torch.allclose(step.logits, model(images[kept], depth=1), atol=1e-5)
    step = walk.send(torch.tensor([1]))
    assert torch.allclose(step.logits, model(images[3:4]), atol=1e-5)
    assert torch.allclose(step.newest, model(images[3:4], reduce=False)[:, 2], atol=1e-5)


@pytest.mark.parametrize("head", ["pool", "conv"])
@pytest.mark.parametrize("measure", MEASURES)
@torch.no_grad()
def test_policies_and_calibration_take_exits_as_they_take_trees(small_backbone, head, measure):
    torch.manual_seed(0)
    model = hierens.multi_exit(small_backbone, 3, head=head).eval()
    images = 3 * torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    macs = model.macs((1, 32, 32))
    for policy, depth in ((FixedDepth(1), 1), (FixedDepth(leaves=1), 0), (Deadline(10_000), 2), (Load(1), 1)):
        found = policy(model, images)
        assert torch.allclose(found.logits, model(images, depth=depth), atol=1e-5)
        assert found.macs.tolist() == [macs[depth]] * 24 and found.leaves.tolist() == [depth + 1] * 24
    held_out = [(images, torch.arange(24) % 10)]
    answers = collect(model, held_out)
    sure = answers.certainties(measure)
    assert answers.macs == macs and sure.shape == (24, 3)
    policy = calibrate(model, answers, sum(macs[:2]) / 2, measure)
    assert isinstance(policy, Confidence)
    found, all_logits = policy(model, images), model(images, reduce=False)
    for image in range(24):
        left = next((b for b in range(2) if sure[image, b] >= policy.thresholds[b]), 2)
        assert found.leaves[image] == left + 1 and found.macs[image] == macs[left]
        assert torch.allclose(found.logits[image], all_logits[image, left], atol=1e-5)
    assert len(set(found.leaves.tolist())) > 1 or measure == "agreement", "a single exit agrees with itself"


def test_every_exit_is_evaluated(plain, small_images):
    labels = plain(small_images, depth=1).argmax(-1)
    result = evaluate_model(plain, [(small_images, labels)])
    assert len(result.accuracy) == 3 and result.accuracy == result.leaf_accuracy and result.accuracy[1] == 100
    profile = plain.profile(batch_size=1)
    assert [row.macs for row in profile.rows] == list(plain.macs()) and "exits" in str(profile)


@pytest.mark.parametrize("kept", [(0, 1, 2), (0, 1), (1, 2), (0,)])
@torch.no_grad()
def test_saved_models_come_back_by_every_way_in(small_backbone, small_images, tmp_path, kept):
    model = hierens.multi_exit(small_backbone, 3, head="conv", weights=[1, 5, 2], learn_weights=True).eval()
    model.weighting.logits += torch.tensor([0.5, 0.0, -0.5])
    model = model.keep_exits(kept).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path, results={"accuracy (%)": [90.0] * len(kept)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "# Multi-exit network of resnet8_cifar" in (tmp_path / "README.md").read_text()
    for loaded in (
        hierens.from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert isinstance(loaded, hierens.MultiExit) and loaded.positions == kept
        for depth in range(len(kept)):
            assert torch.allclose(loaded(small_images, depth=depth), model(small_images, depth=depth), atol=1e-5)


@torch.no_grad()
def test_probabilities_are_averaged_wherever_logits_would_be(small_backbone, small_images, tmp_path):
    model = hierens.multi_exit(small_backbone, 3, weights=[1, 5, 2], average="probabilities").eval()
    leaf = model(small_images, reduce=False).softmax(2)
    model.save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    for depth, step in enumerate(model.anytime(small_images)):
        weights = torch.tensor([1.0, 5, 2])[: depth + 1]
        expected = (leaf[:, : depth + 1] * (weights / weights.sum())[:, None]).sum(1)
        for logits in (step.logits, model(small_images, depth=depth), loaded(small_images, depth=depth)):
            torch.testing.assert_close(logits.exp(), expected, rtol=1e-4, atol=1e-6)
        assert torch.allclose(model.at_depth(depth)(small_images).exp(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="is for exits that are combined: give weights"):
        hierens.multi_exit(small_backbone, 3, average="probabilities")
    with pytest.raises(ValueError, match="average must be 'logits' or 'probabilities', got 'mean'"):
        hierens.multi_exit(small_backbone, 3, weights="uniform", average="mean")


@torch.no_grad()
def test_collaboration_and_new_classifiers_survive_saving(model, small_images, tmp_path):
    model.reset_classifier(4)
    disturbed(model).save_pretrained(tmp_path)
    loaded = hierens.from_pretrained(tmp_path)
    assert loaded.collaborate and torch.allclose(loaded(small_images), model(small_images), atol=1e-5)
    assert loaded(small_images).shape == (4, 4)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=6)
    assert other(small_images).shape == (4, 6)


def test_a_config_that_cannot_be_is_refused(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"kept": [0, 7]}, "no usable list of exits"),
        ({"kept": []}, "no usable list of exits"),
        ({"branching": [1, 2]}, "does not know: branching"),
        ({"weights": [1.0]}, "no usable weights of exits"),
        ({"average": "mean"}, "no usable average of exits"),
        ({"boosted": 1}, "no usable boosted"),
    ):
        damaged = config | {"model_args": config["model_args"] | change}
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(LoadError, match=message):
            hierens.from_pretrained(tmp_path)


def test_features_are_the_backbones(plain, model, small_backbone, small_images):
    features = plain.forward_features(small_images)
    assert torch.equal(features, small_backbone.forward_features(small_images))
    assert torch.equal(plain.forward_head(features), small_backbone(small_images))
    pooled = small_backbone.forward_head(features, pre_logits=True)
    assert torch.equal(plain.forward_head(features, pre_logits=True), pooled)
    first = plain.forward_features(small_images, depth=0)
    assert torch.equal(plain.exits[0](first), plain(small_images, depth=0))
    with pytest.raises(ValueError, match="other exits contribute"):
        model.forward_head(features)


def test_timms_factories_take_it(model):
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(scales) == len(named)
    first, later = (next(p for n, p in named.items() if n.startswith(f"levels.{i}.")) for i in (0, 2))
    assert scales[id(first)] < scales[id(later)] < scales[id(named["exits.2.classifier.fc.weight"])] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: hierens.multi_exit(b, 99), "exits=99 is more than"),
        (lambda b: hierens.multi_exit(b, 2, head="mlp"), "head must be 'pool' or 'conv', got 'mlp'"),
        (lambda b: hierens.multi_exit(b, 2, weights="linear_risng"), "did you mean 'linear_rising'"),
        (lambda b: hierens.multi_exit(b, 2, weights=[1, 0]), "2 positive numbers"),
        (lambda b: hierens.multi_exit(b, 2).keep_exits([2]), "exits must be some of 0 to 1"),
        (lambda b: hierens.multi_exit(b, 2, collaborate=True).keep_exits([1]), "need all exits before them"),
        (lambda b: hierens.multi_exit(b, 2, boosted=True, weights="uniform"), "sums already, and have no weights"),
        (lambda b: hierens.multi_exit(b, 2, boosted=True).keep_exits([1]), "exits that are boosted need all exits"),
        (lambda b: hierens.multi_exit(b, 2, collaborate=True).with_collaboration(), "can be added once"),
        (lambda b: hierens.multi_exit(b, 2)(torch.zeros(1, 1, 32, 32), depth=2), "depth must be from 0 to 1"),
        (lambda b: hierens.multi_exit(b, 2)(torch.zeros(1, 3, 32, 32)), r"expected images \(N, 1, H, W\)"),
        (lambda b: hierens.multi_exit(b, 2).prune(), "are not combined"),
    ],
)
def test_bad_requests_are_named(small_backbone, call, message):
    with pytest.raises(ValueError, match=message):
        call(small_backbone)


def test_recomputed_activations_give_the_same_step(small_backbone, small_images):
    model = hierens.multi_exit(with_statistics(small_backbone, 32), 3, head="conv").train()
    gradients = []
    for enable in (False, True):
        copy = hierens.multi_exit(small_backbone, 3, head="conv").train()
        copy.load_state_dict(model.state_dict())
        copy.set_grad_checkpointing(enable)
        copy(small_images, reduce=False).square().sum().backward()
        gradients.append([p.grad for p in copy.parameters()] + list(copy.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
