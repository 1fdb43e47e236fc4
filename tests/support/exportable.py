"""Models of every kind that is exported, by name. Each is converted once per session and given out as a copy."""

import copy
from functools import cache

import timm
import torch

import hierens
from support.networks import independent_tree, tiny_backbone, with_statistics


def tree(blocks=3):
    return copy.deepcopy(_tree(blocks))


@cache
def _tree(blocks):
    model = independent_tree(tiny_backbone((8, 16, 32)), blocks)
    model.pretrained_cfg.update(input_size=(1, 28, 28), label_names=["shirt"] * 10)
    return model


def mobile():
    torch.manual_seed(0)
    model = independent_tree(timm.create_model("mobilenetv2_035", num_classes=5), 2)
    model.pretrained_cfg.update(input_size=(3, 40, 40))
    return model


def transformer():
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return independent_tree(timm.create_model("vit_tiny_patch16_224", **args), 2)


def exits(**kwargs):
    backbone = with_statistics(tiny_backbone((8, 8, 16)), size=28)
    model = hierens.multi_exit(backbone, exits=3, **kwargs)
    model.pretrained_cfg.update(input_size=(1, 28, 28))
    return model.eval()


def tree_with_exits():
    backbone = with_statistics(tiny_backbone((8, 8, 16)), size=28)
    model = hierens.tree_with_exits(backbone, 3, head="conv")
    model.break_symmetry(0.3)
    model.pretrained_cfg.update(input_size=(1, 28, 28))
    return model.eval()


def looped():
    """A level that has no grouped form."""
    model = tree(2)
    model.levels[1].loop("for this test")
    return model


MODELS = {"tree": tree, "mobile": mobile, "transformer": transformer, "looped": looped, "fused": lambda: tree().fuse()}
MODELS |= {
    "tree with exits": tree_with_exits,
    "exits": exits,
    "ensemble": lambda: exits(collaborate=True, weights="uniform"),
}
