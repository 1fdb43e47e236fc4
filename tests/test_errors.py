"""Common mistakes end in one sentence with what was wrong and what to do, in the words of Python or of the program."""

from functools import cache, partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import hierens
from hierens.core.tree import Tree
from hierens.cutting.cut import CutError
from hierens.export.export import ExportError
from hierens.hub.saving import CONFIG, save_config
from hierens.training.checkpoints.resuming import check_model
from support import command_line
from support.networks import tiny_backbone
from support.runs import trainer

MAKERS = {"tree": hierens.hierensify, "multi-exit": hierens.multi_exit, "tree with exits": hierens.tree_with_exits}
IMAGES = torch.zeros(2, 1, 32, 32)


@cache
def made(kind):
    if kind == "fused":
        return made("tree").fuse()
    return MAKERS[kind](tiny_backbone((8, 8, 8)), 2).eval()


def headless():
    backbone = tiny_backbone((8, 8, 8))
    backbone.fc = torch.nn.Identity()
    return backbone


BACKBONES = {
    "string": (lambda: "resnet18", ["not its name", "timm.create_model('resnet18')"]),
    "none": (lambda: None, ["must be a timm model, such as timm.create_model(", "got a builtins.NoneType"]),
    "function": (lambda: timm.create_model, ["must be a timm model", "function"]),
    "torchvision": (
        lambda: torchvision.models.squeezenet1_1(),
        ["a torchvision.models.squeezenet.SqueezeNet is not a timm model", "'classifier.1'", "input_size=(C, H, W)"],
    ),
    "features": (
        lambda: timm.create_model("test_resnet", features_only=True),
        ["FeatureListNet", "feature maps", "without features_only=True"],
    ),
    "no classifier": (
        lambda: headless(),
        ["CifarResNet has no classifier for its classes", "call reset_classifier"],
    ),
    **{
        kind: (lambda kind=kind: made(kind), [f"this {name} is converted already", "timm model that it was made from"])
        for kind, name in (
            ("tree", "HierarchicalEnsemble"),
            ("fused", "FusedEnsemble"),
            ("multi-exit", "MultiExit"),
            ("tree with exits", "TreeWithExits"),
        )
    },
}
CONVERSIONS = [
    (lambda make=make, backbone=backbone: make(backbone(), 2), CutError, words)
    for make in MAKERS.values()
    for backbone, words in BACKBONES.values()
]
BLOCKS = [
    (lambda make=make, value=value: make(tiny_backbone((8, 8, 8)), value), ValueError, [f"{name} must be {allowed}"])
    for make, name in (
        (hierens.hierensify, "blocks"),
        (hierens.multi_exit, "exits"),
        (hierens.tree_with_exits, "blocks"),
    )
    for value, allowed in (
        ("4", "an integer, at least 1, got '4'."),
        (2.5, "an integer, at least 1, got 2.5."),
        (True, "an integer, at least 1, got True."),
        (None, "an integer, at least 1, got None."),
        (0, "at least 1, got 0."),
        (-1, "at least 1, got -1."),
    )
    if (name, value) != ("exits", None)
]
TREES = [
    *(
        (lambda make=make: make(tiny_backbone((8, 8, 8)), at="layer2"), CutError, ["give at=['layer2']."])
        for make in MAKERS.values()
    ),
    (lambda: hierens.multi_exit(tiny_backbone((8, 8, 8)), 99), CutError, ["exits=99 is more than", "at most"]),
    (lambda: hierens.multi_exit(torchvision.models.AlexNet(), num_classes=3), CutError, ["classifier='classifier.6'"]),
    (lambda: hierens.hierensify(tiny_backbone((8, 8, 8)), 2, leaves=1.5), ValueError, ["leaves must be an integer"]),
    (lambda: Tree((1, 2), leaves="2"), ValueError, ["leaves must be an integer, from 1 to 2", "got '2'"]),
]
CALLS = {
    "forward": lambda model, depth: model(IMAGES, depth=depth),
    "at_depth": lambda model, depth: model.at_depth(depth),
    "leaves_at": lambda model, depth: model.leaves_at(depth),
}
DEPTHS = [
    (lambda kind=kind, call=call, value=value: call(made(kind), value), ValueError, [f"depth must be {allowed}", got])
    for kind in (*MAKERS, "fused")
    for call in CALLS.values()
    for value, allowed, got in (
        (1.5, "an integer, from 0 to", "got 1.5."),
        (1.0, "an integer, from 0 to", "got 1.0."),
        (True, "an integer, from 0 to", "got True."),
        ("1", "an integer, from 0 to", "got '1'."),
        (-1, "from 0 to", "leaves, got -1."),
        (99, "from 0 to", "leaves, got 99."),
    )
]
LEAVES = [
    (lambda kind=kind: made(kind)(IMAGES, leaves=1.5), ValueError, ["leaves must be an integer, from 1 to", "got 1.5"])
    for kind in (*MAKERS, "fused")
]
PREPARE = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
INPUTS = [
    (
        lambda kind=kind, call=call, x=x: call(made(kind), x),
        ValueError,
        ["images (N, 1, H, W)", f"got a {got}", PREPARE],
    )
    for kind in (*MAKERS, "fused")
    for call in (lambda m, x: m(x), lambda m, x: list(m.anytime(x)), lambda m, x: m.forward_features(x))
    for x, got in (
        (IMAGES.numpy(), "ndarray"),
        ([IMAGES], "list"),
        (IMAGES.byte(), "tensor of torch.uint8"),
        (IMAGES.long(), "tensor of torch.int64"),
    )
]
SIZES = [
    (lambda kind=kind, call=call, size=size: call(made(kind), size), kind_of_error, ["size must be (1, H, W)", got])
    for kind in (*MAKERS, "fused")
    for call, kind_of_error in (
        (lambda m, size: m.profile(size), ValueError),
        (lambda m, size: m.macs(size), ValueError),
        (lambda m, size: m.export("nowhere", format="torch-export", size=size), ExportError),
    )
    for size, got in (
        (32, "got 32."),
        ((32, 32), "got (32, 32)."),
        ((32, 32, 1), "first, got"),
        ((1, 0, 32), "got (1, 0"),
    )
]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [*CONVERSIONS, *BLOCKS, *TREES, *DEPTHS, *LEAVES, *INPUTS, *SIZES],
)
def test_mistakes_in_python(call, kind, words):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(word in message for word in words), message


def test_integers_of_other_types_are_depths():
    model = made("tree")
    assert torch.equal(model(IMAGES, depth=np.int64(1)), model(IMAGES, leaves=torch.tensor(2)))
    assert model.macs(torch.Size([1, 32, 32])) == model.macs([1, 32, 32])


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("tree", "multi-exit", "method='hne', this run has 'multi_exit'"),
        ("tree of three", "tree", "blocks=3, this run has 2"),
        ("two exits of three", "multi-exit of three", "exits=2, this run has 3"),
        ("tree with three leaves", "tree", "branching=[1, 3], this run has [1, 2]"),
        ("another backbone", "tree", "backbone='resnet14_cifar', this run has 'resnet8_cifar'"),
    ],
)
def test_a_run_of_another_network_does_not_resume(before, now, words, tmp_path):
    save_config(other(before), tmp_path)
    with pytest.raises(ValueError) as caught:
        check_model(tmp_path, other(now))
    message = str(caught.value)
    assert words in message and "Keep the value, or start anew with resume='never'." in message, message
    check_model(tmp_path, other(before))
    (tmp_path / CONFIG).unlink()
    check_model(tmp_path, other(now))


def other(kind):
    backbone = tiny_backbone((8, 8, 8))
    if kind == "tree of three":
        return hierens.hierensify(backbone, 3, looped={})
    if kind == "tree with three leaves":
        return hierens.hierensify(backbone, branching=(1, 3), looped={})
    if kind == "another backbone":
        return hierens.hierensify(timm.create_model("resnet14_cifar", channels=(8, 8, 8), in_chans=1), 2, looped={})
    if kind.endswith("of three"):
        model = hierens.multi_exit(backbone, 3)
        return model if kind.startswith("multi") else model.at_depth(1)
    return made(kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tree, an image, and a run of three blocks."""
    folder = tmp_path_factory.mktemp("errors")
    made("tree").save_pretrained(folder / "model")
    Image.new("L", (32, 32)).save(folder / "a.png")
    trainer(folder / "run", epochs=1).fit()
    return folder


RUN = ("train", "--preset", "digits", "--workers", "0", "--output-dir", "run")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*RUN, "--blocks", "2"), 1, ["with --blocks 3, this run has 2", "start anew with --resume never"]),
        ((*RUN, "--start", "model", "--method", "multi_exit"), 1, ["model was made by another", "use --method hne."]),
        (("train", "--epochs", "0"), 2, ["epochs must be at least 1, got 0"]),
        (("profile", "test_resnet", "--blocks", "0"), 1, ["--blocks must be at least 1, got 0."]),
        (("profile", "test_resnet", "--blocks", "2.5"), 2, ["--blocks", "2.5"]),
        (
            ("profile", "test_resnet", "--method", "multi_exit", "--exits", "0"),
            1,
            ["--exits must be at least 1, got 0."],
        ),
        (("profile", "test_resnet", "--method", "multi_exit", "--exits", "99"), 1, ["--exits 99 is more than this"]),
        (("profile", "model", "--size", "32"), 2, ["--size", "INT INT INT"]),
        (("profile", "model", "--size", "32", "32", "1"), 1, ["--size must be (1, H, W)", "got (32, 32, 1)."]),
        (("predict", "model", "a.png", "--depth", "9"), 1, ["--depth must be from 0 to 1 for 2 leaves, got 9."]),
        (("predict", "model", "a.png", "--depth", "1.5"), 2, ["--depth", "1.5"]),
        (
            ("export", "model", "out", "--format", "torch-export", "--depths", "9"),
            1,
            ["--depths must be 'all' or some"],
        ),
        (
            ("export", "model", "out", "--format", "torch-export", "--size", "32", "32", "1"),
            1,
            ["--size must be (1, H, W)"],
        ),
    ],
)
def test_mistakes_at_the_command_line(arguments, code, words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = command_line.hierens(*arguments)
    assert done.code == code and not done.out and all(word in done.err for word in words), done.err
    assert code == 2 or done.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("method", ["hne", "multi_exit"])
def test_a_backbone_without_classifier_has_a_profile(monkeypatch, method):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, num_classes=0))
    parts = ["--exits" if method == "multi_exit" else "--blocks", "2"]
    done = command_line.hierens("profile", "test_resnet", "--method", method, *parts, "--size", "3", "32", "32")
    assert done.code == 0 and done.out.count("\n") == 4, done.err
