"""Small networks whose outputs differ between images and between leaves."""

import copy
from functools import cache

import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import hierens
from hierens.core.timm_info import example_input

SIZES = (64, 128)  # pixels tried before a model's own


def tiny_backbone(channels=(4, 8, 8), **arguments):
    """A ResNet-8 for grey images, from 16 pixels on."""
    torch.manual_seed(0)
    return timm.create_model("resnet8_cifar", **{"channels": channels, "in_chans": 1} | arguments)


def with_statistics(backbone, size=64, seed=0):
    """Give batch norms weights, biases and running statistics other than the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    channels = getattr(backbone, "in_chans", 3)
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    backbone.train()
    with torch.no_grad():
        for _ in range(8):
            backbone(torch.randn(16, channels, size, size, generator=generator))
    return backbone.eval()


@torch.no_grad()
def randomize(model):
    """Random values where initialisation leaves zeros and ones, so that every path changes the output."""
    for parameter in model.parameters():
        if parameter.ndim <= 1 or parameter.std() == 0:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


@torch.no_grad()
def few_pixels(backbone):
    """Two images, as small as the backbone takes them."""
    full = example_input(backbone, 2)
    for size in SIZES:
        try:
            backbone(full[..., :size, :size])
        except Exception:
            continue
        return full[..., :size, :size]
    return full


def independent_tree(backbone, blocks=None, seed=0, **arguments):
    """A tree of branches with independent weights and running statistics, in evaluation mode.

    `looped={}` among the arguments leaves out the self-check.
    """
    model = hierens.hierensify(backbone, blocks, init="reinit", seed=seed, **arguments)
    torch.manual_seed(seed)
    randomize(model)
    return model.eval()


def tiny_tree(blocks=3, channels=(4, 8, 8), seed=0, **arguments):
    """An independent tree of tiny backbones, without the self-check."""
    return independent_tree(tiny_backbone(channels, **arguments), blocks, seed, looped={})


def timm_tree(name, blocks, **args):
    """An independent tree of one of timm's backbones, and images for it."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10, **args).eval()
    return independent_tree(backbone, blocks), few_pixels(backbone)


_kept_tree = cache(timm_tree)


def shared_tree(name, blocks):
    """A copy of a `timm_tree` that is converted once per session, and the images."""
    model, images = _kept_tree(name, blocks)
    return copy.deepcopy(model), images


def difference(a, b):
    """The largest difference, relative to the largest value of the second."""
    return float((a - b).abs().max() / b.abs().max())


def close(a, b, tolerance=1e-4):
    return difference(a, b) < tolerance
