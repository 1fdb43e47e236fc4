"""Flags of modules and parameters, put aside for a while and given back one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

# Decorates what makes models: called inside torch.inference_mode(), too, they are of tensors that can be trained.
ordinary_tensors = torch.inference_mode(False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or evaluation mode inside, each back in its own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, own in modes.items():
            module.training = own


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Every module in evaluation mode inside, each back in its own mode after."""
    return in_mode(model, False)


def quiet_dropout(model: nn.Module) -> None:
    """Every kind of dropout in evaluation mode: two ways to run a model draw in different orders."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
