"""Temporary changes of training modes and inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from hierens.core.protocol import AdaptiveModel

# Decorator of functions that create models: their tensors can be trained even if called in torch.inference_mode().
ordinary_tensors = torch.inference_mode(False)


@contextmanager
def in_mode(model: nn.Module | AdaptiveModel, training: bool) -> Iterator[None]:
    """Set all modules to training or evaluation mode, and restore the mode of each at the end."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, own in modes.items():
            module.training = own


def evaluating(model: nn.Module | AdaptiveModel) -> AbstractContextManager[None]:
    """Set all modules to evaluation mode, and restore the mode of each at the end."""
    return in_mode(model, False)


def quiet_dropout(model: nn.Module) -> None:
    """Set all kinds of dropout to evaluation mode, since executors draw random numbers in different orders."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw random numbers from this seed, and leave torch's generators as they were; with None, draw from these."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
