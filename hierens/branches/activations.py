"""The outputs of a level's branches, as a list or as tensors concatenated along the channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hierens.core.block_values import Value, each


class Activations:
    """The outputs of the first branches of a level.

    They are stored in one of two forms: one value per branch, or tensors with all branches concatenated along the
    channels. Each form is converted to the other on demand, so consecutive levels with the same executor copy nothing.
    A value is a tensor, or a tuple if several values cross a cut. `taps` are other values of the branches, each a list
    with one tensor per branch (`hierens.branches.intermediates`).
    """

    def __init__(
        self,
        values: Sequence[Value] = (),
        packed: Value = None,
        count: int = 0,
        taps: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        self.values, self.packed, self.taps = list(values), packed, taps
        self.count = count or len(self.values)

    def listed(self) -> list[Value]:
        """One value per branch."""
        if self.packed is None:
            return self.values
        if isinstance(self.packed, Tensor):
            return list(self.packed.chunk(self.count, dim=1))
        return list(zip(*(tensor.chunk(self.count, dim=1) for tensor in self.packed), strict=True))

    def side_by_side(self) -> Value:
        """One tensor (N, branches*C, ...), or one for each value that crosses the cut."""
        if self.packed is not None:
            return self.packed
        if self.count == 1:
            return self.values[0]
        return _combined(lambda tensors: torch.cat(tensors, dim=1), self.values)

    def some(self, which: Sequence[int]) -> Activations:
        """The values of these branches; an index may occur several times."""
        if list(which) == list(range(self.count)):
            return self
        values = self.listed()
        return Activations([values[branch] for branch in which])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """Apply a function that keeps the shape to every tensor."""
        if self.packed is not None:
            return Activations(packed=each(change, self.packed), count=self.count)
        return Activations([each(change, value) for value in self.values])

    def stacked(self) -> Value:
        """The tensors of all branches along a new dim 1: (N, branches, ...)."""
        if isinstance(self.packed, Tensor):
            return self.packed.unflatten(1, (self.count, -1))
        return _combined(lambda tensors: torch.stack(tensors, dim=1), self.listed())

    @classmethod
    def unstacked(cls, stacked: Value) -> Activations:
        """The inverse of `stacked`."""
        if isinstance(stacked, Tensor):
            return cls(list(stacked.unbind(1)))
        return cls(list(zip(*(tensor.unbind(1) for tensor in stacked), strict=True)))

    def first_tensor(self) -> Tensor:
        """One of the tensors, which all have the same device and dtype."""
        value = self.values[0] if self.packed is None else self.packed
        return value if isinstance(value, Tensor) else value[0]


def _combined(combine: Callable[[list[Any]], Any], values: Sequence[Value]) -> Value:
    """Combine the branches' tensors; for tuples, position by position."""
    if isinstance(values[0], Tensor):
        return combine(list(values))
    return tuple(combine(list(parts)) for parts in zip(*values, strict=True))
