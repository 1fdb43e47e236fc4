"""What a backbone specifies about its images, classes and features, and example images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Description:
    """What a timm model specifies by itself; `hierens.cutting.backbones.described` attaches it to other networks.

    Attributes:
        input_size: of an image, (C, H, W).
        classifier_names: names of the last layers.
        num_classes: outputs of the last layer.
        num_features: inputs of the last layer.
        dense: whether the output has positions, (N, classes, ...), as for segmentation.
    """

    input_size: tuple[int, int, int]
    classifier_names: tuple[str, ...]
    num_classes: int
    num_features: int
    dense: bool = False


def description(model: nn.Module) -> Description | None:
    """The description that was attached to a network; None for a timm model."""
    found: Any = getattr(model, "_hierens_description", None)
    return found if isinstance(found, Description) else None


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of a model's images; a timm model's attribute `in_chans` takes precedence."""
    if own := description(model):
        return own.input_size
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    traits = getattr(model, "_traits", None) or {}
    if traits.get("img_size"):
        size = (size[0], *traits["img_size"])
    if first_conv := cfg.get("first_conv"):
        name = first_conv if isinstance(first_conv, str) else first_conv[0]
        size = (model.get_parameter(f"{name}.weight").shape[1], *size[1:])
    return (int(getattr(model, "in_chans", size[0])), int(size[1]), int(size[2]))


def num_classes(model: nn.Module) -> int:
    """Number of a model's classes."""
    return own.num_classes if (own := description(model)) else int(model.num_classes)  # type: ignore[arg-type]


def num_features(model: nn.Module) -> tuple[int, int]:
    """Channels of a model's feature maps, and of what its classifier reads."""
    if own := description(model):
        return own.num_features, own.num_features
    features = int(model.num_features)  # type: ignore[arg-type]
    return features, int(getattr(model, "head_hidden_size", features))


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """A random batch (N, C, H, W) of the size of a model's images, with a fixed seed."""
    parameter = next(model.parameters(), torch.empty(0))
    values = torch.randn(batch, *input_size(model), generator=torch.Generator().manual_seed(0))
    return values.to(parameter.device, parameter.dtype)
