"""The measured networks and precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

import hierens

DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Network:
    """A tree to measure.

    Attributes:
        entry: timm name of the tree, or of the backbone that is cut into `blocks`.
        size: size of the images, (C, H, W).
        blocks: number of blocks; 0 if the entry is a tree.
        arguments: further arguments of `timm.create_model`.
    """

    entry: str
    size: tuple[int, int, int]
    blocks: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)


NETWORKS = {
    "hne_resnet50_cifar_small": Network("hne_resnet50_cifar_small", (3, 32, 32), arguments={"num_classes": 100}),
    "hne_mobilenetv2_075": Network("hne_mobilenetv2_075", (3, 224, 224), arguments={"num_classes": 1000}),
    "resnet18": Network("resnet18", (3, 224, 224), 4),
    "vit_tiny": Network("vit_tiny_patch16_224", (3, 224, 224), 4),
}
TINY = {
    "tiny_resnet": Network("resnet8_cifar", (3, 16, 16), 3, {"channels": [4, 4, 8]}),
    "tiny_vit": Network("test_vit", (3, 32, 32), 2, {"img_size": 32, "num_classes": 7}),
}


@cache
def built(network_name: str) -> hierens.HierarchicalEnsemble:
    """A tree with independent random weights, in evaluation mode, on the CPU. Callers must copy it before changes."""
    network = {**NETWORKS, **TINY}[network_name]
    torch.manual_seed(0)
    made = timm.create_model(network.entry, **network.arguments)
    model = hierens.hierensify(made, network.blocks, init="reinit", seed=0) if network.blocks else made
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm initialises residual branches to 0, which would hide their output
    return model.eval()


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Context manager: sets the precision of float32 operations; yields the type of weights and images."""
    fast = name == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    try:
        yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
