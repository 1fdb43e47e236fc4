"""Which weights are trained, and by which optimiser: any of timm's, over any of its groups."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from hierens.models.adaptive import Adaptive
from hierens.training.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that a config names; biases and norms are spared from weight decay, frozen weights left out.

    Raises:
        ValueError: a name or an argument that timm does not take.
    """
    try:
        return create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **config.optimizer_args,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm cannot make the optimiser {config.optimizer!r}: {error}") from error


def frozen_levels(model: Adaptive, config: TrainConfig) -> list[nn.Module]:
    """The levels that are frozen when training starts; those never to be unfrozen take no gradients at all.

    Raises:
        ValueError: the tree has fewer levels.
    """
    if config.freeze_levels > len(model.levels):
        raise ValueError(f"freeze_levels is {config.freeze_levels}, but the model has {len(model.levels)} levels.")
    levels: list[nn.Module] = list(model.levels)[: config.freeze_levels]
    if config.unfreeze_epoch is None:
        for level in levels:
            level.requires_grad_(False)
    return levels
