"""Packed parameters: what the branches of a level hold, concatenated along dim 0, branch by branch.

The first w branches are a view, and `ndim` and names are the backbone's own (timm's weight-decay groups stay right).
A value without dimensions, such as batch norm's counter, becomes a vector with an entry per branch; the names of those
are kept beside the level as its `scalars`, since a packed tensor no longer tells.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Width:
    """Which of a level's branches run: `active` of `total`, from `start` on; each input feeds `siblings` of them."""

    active: int
    total: int
    start: int = 0
    siblings: int = 1

    @property
    def parents(self) -> int:
        """How many inputs there are."""
        return self.active // self.siblings

    def rows(self, packed: Tensor | None) -> Any:
        """The active branches' part, a view, of a packed tensor."""
        if packed is None or self.active == self.total:
            return packed
        rows = packed.shape[0] // self.total
        return packed[rows * self.start : rows * (self.start + self.active)]

    def stacked(self, packed: Tensor) -> Tensor:
        """The active branches' values along a new dim 0: (active, ...); a view."""
        return self.rows(packed).unflatten(0, (self.active, -1))


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; constants that are not saved stay shared by all branches."""
    for prefix, part in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield prefix + name, buffer


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor out of each branch's."""
    return torch.stack(list(tensors)) if tensors[0].ndim == 0 else torch.cat(list(tensors))


def branch_states(
    module: nn.Module, scalars: Container[str], total: int, stop: int, start: int = 0
) -> list[dict[str, Tensor]]:
    """The state dicts of branches `start` to `stop` of a module with packed tensors, as views."""
    split = {name: _split(tensor, name in scalars, total, start, stop) for name, tensor in state_of(module)}
    return [{name: parts[i] for name, parts in split.items()} for i in range(stop - start)]


def _split(tensor: Tensor, scalar: bool, total: int, start: int, stop: int) -> Sequence[Tensor]:
    # One split per parameter, not a slice per branch: its backward is a single concatenation.
    rows = tensor.shape[0] // total
    own = tensor if (start, stop) == (0, total) else tensor[start * rows : stop * rows]
    return own.unbind() if scalar else own.split(rows)


def replace(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer."""
    owner, _, key = name.rpartition(".")
    place = module.get_submodule(owner)
    if isinstance(old, nn.Parameter):
        place._parameters[key] = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    else:
        place._buffers[key] = new.detach()


def caches_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where some attention layers keep, while evaluating, what they computed from their weights."""
    return [
        (part, name)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, dict) and name.endswith("bias_cache")
    ]


def forget(caches: Sequence[tuple[nn.Module, str]]) -> None:
    """Empty them, for other weights are about to be put in place."""
    for part, name in caches:
        getattr(part, name).clear()
