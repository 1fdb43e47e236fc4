"""What blocks take and hand on: batches, and the values that cross a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Value = Any  # what one branch hands on: a tensor, or the tuple of values that cross a cut


def each(change: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Change a tensor, or each of the tensors that cross."""
    if isinstance(value, tuple):
        return tuple(each(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def is_empty(x: Tensor) -> bool:
    """Whether a batch has no images; while a graph is made, whose batches may have any size, it has some."""
    return not torch.compiler.is_compiling() and len(x) == 0


def select_samples(value: Any, kept: Tensor, count: int) -> Any:
    """Some images of what a block handed on: of every tensor that has an entry for each of `count` images."""
    if isinstance(value, tuple):
        return tuple(select_samples(part, kept, count) for part in value)
    return value[kept] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
