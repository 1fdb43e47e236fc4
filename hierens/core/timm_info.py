"""The size of a timm model's images, and example images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of a timm model's images; its attribute `in_chans` takes precedence."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    traits = getattr(model, "_traits", None) or {}
    if traits.get("img_size"):
        size = (size[0], *traits["img_size"])
    if first_conv := cfg.get("first_conv"):
        name = first_conv if isinstance(first_conv, str) else first_conv[0]
        size = (model.get_parameter(f"{name}.weight").shape[1], *size[1:])
    return (int(getattr(model, "in_chans", size[0])), int(size[1]), int(size[2]))


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """A random batch (N, C, H, W) of the size of a timm model's images, with a fixed seed."""
    parameter = next(model.parameters(), torch.empty(0))
    values = torch.randn(batch, *input_size(model), generator=torch.Generator().manual_seed(0))
    return values.to(parameter.device, parameter.dtype)
