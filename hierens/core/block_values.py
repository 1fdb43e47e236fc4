"""The inputs and outputs of blocks: batches, and the values that cross a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Value = Any  # the output of a branch: a tensor, or a tuple of the values that cross a cut


def each(change: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Apply a function to all floating-point tensors of a value."""
    if isinstance(value, tuple):
        return tuple(each(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def is_empty(x: Tensor) -> bool:
    """Whether a batch has no images; False while compiling, since a graph is for batches of any size."""
    return not torch.compiler.is_compiling() and len(x) == 0


def select_samples(value: Any, kept: Tensor, count: int) -> Any:
    """Select images from a block's output, in every tensor that has an entry for each of `count` images."""
    if isinstance(value, tuple):
        return tuple(select_samples(part, kept, count) for part in value)
    return value[kept] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
