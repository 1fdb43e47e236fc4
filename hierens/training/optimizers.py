"""The optimiser of a run: any of timm's."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from hierens.training.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a config; biases and norms have no weight decay, frozen weights are left out.

    Raises:
        ValueError: a name or an argument that timm does not accept.
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
        raise ValueError(f"timm cannot create the optimiser {config.optimizer!r}: {error}") from error
