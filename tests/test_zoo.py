"""Architectures of every kind: copies are exact at every depth, packed equals looped, saved models come back."""

import copy

import pytest
import timm
import torch
import zoo
from timm.models import model_entrypoint

import hierens
from hierens.core.modes import quiet_dropout
from support.networks import few_pixels, randomize

SAMPLE = {
    "test_convnext": "channel layer norm, layer scale",
    "test_nfnet": "scaled weight standardisation, a gain that is changed in place",
    "test_vit": "class token and position embedding",
    "test_coatnet": "relative position bias from a table",
    "test_mambaout": "gated convolutions on channels-last maps",
    "test_byobnet": "re-parameterisable blocks",
    "levit_128s": "attention biases that evaluation caches, two heads, batch norm over tokens",
    "xcit_nano_12_p8_224": "cross-covariance attention, a position encoding from a grid",
    "hrnet_w18_small": "parallel branches: several tensors cross a cut",
    "resnest14d": "split attention",
    "ghostnet_050": "slices of channels",
    "dla46x_c": "trees of blocks",
    "mobilevit_xxs": "attention whose shape is decided on the way: layers looped in place",
    "pit_xs_224": "a tuple of tokens between stages",
}

LARGE = ("levit_128s", "xcit_nano_12_p8_224", "hrnet_w18_small", "resnest14d", "dla46x_c", "pit_xs_224")
sampled = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in SAMPLE]
)


@pytest.mark.sampled
@sampled
def test_sampled_families_convert_exactly(name):
    check(zoo.examine(name, thorough=False))


@pytest.mark.sampled
@sampled
def test_gradients_do_not_depend_on_the_executor(name):
    backbone = timm.create_model(name, num_classes=10)
    randomize(backbone)
    model = hierens.hierensify(backbone, branching=(2, 1, 1, 1)).double().train()  # every level has two branches
    model.break_symmetry(noise=0.3)
    images = few_pixels(backbone.eval()).double()
    gradients = {}
    for executor in ("looped", "grouped"):
        tree = copy.deepcopy(model)
        tree.set_executor(executor)
        quiet_dropout(tree)
        (tree(images, reduce=False) ** 2).sum().backward()
        gradients[executor] = {name: p.grad for name, p in tree.named_parameters() if p.grad is not None}
    assert gradients["looped"].keys() == gradients["grouped"].keys()
    for key, expected in gradients["looped"].items():
        assert torch.allclose(gradients["grouped"][key], expected, atol=1e-6 * float(expected.abs().max()) + 1e-9), key


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({model_entrypoint(name).__module__ for name in zoo.architectures()}))
def test_every_model_file_converts_exactly(file):
    names = [name for name in zoo.architectures() if model_entrypoint(name).__module__ == file]
    check(zoo.examine(min(names, key=parameters)))


def parameters(name):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def check(found):
    assert found["copy"] <= zoo.EXACT
    assert found["eval"] <= zoo.EXACT and found["train"] <= zoo.EXACT
    assert found["deepcopy"] is True and found["saved"] is True
