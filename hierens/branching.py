"""A level of the tree: one block in several independent copies, its branches.

A level keeps the block's own module tree, in which every parameter and persistent buffer holds all branches' values
concatenated along dim 0, branch by branch. So the first w branches are a view, `ndim` and names are the backbone's,
and the state dict does not depend on how the level is run. There are two ways to run it:

- looped: the block is called once per branch, with that branch's slices put in place of its weights. Always available;
  it defines what is right.
- grouped: `hierens.packing` runs several branches in one call: all of them, or for inference a few at a time, whatever
  is fastest. A block earns it at conversion by `hierens.checking.self_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from hierens.packed import Width, branch_states, caches_of, concatenate, forget, replace, state_of
from hierens.packing import Packed
from hierens.packing_rules import PackError

Executor = Literal["auto", "looped", "grouped"]
Value = Any  # what one branch hands on: a tensor, or the tuple of values that cross a cut
# Weights per branch up to which one grouped call beats a loop on CPUs (docs/architecture.md).
_LIGHT, _LIGHT_FROZEN = 1_000_000, 4_000_000


class Activations:
    """What the first branches of a level hand on: one value per branch, or tensors with all branches side by side.

    The two forms turn into each other on demand, so that a run of levels with the same executor copies nothing. A value
    is a tensor, or a tuple where several values cross a cut.
    """

    def __init__(self, values: Sequence[Value] = (), packed: Value = None, count: int = 0) -> None:
        self.values, self.packed = list(values), packed
        self.count = count or len(self.values)

    def listed(self) -> list[Value]:
        """One value per branch."""
        if self.packed is None:
            return self.values
        if isinstance(self.packed, Tensor):
            return list(self.packed.chunk(self.count, dim=1))
        return list(zip(*(tensor.chunk(self.count, dim=1) for tensor in self.packed), strict=True))

    def side_by_side(self) -> Value:
        """One tensor (N, branches*C, ...), or one for each of the values that cross."""
        if self.packed is not None:
            return self.packed
        if self.count == 1:
            return self.values[0]
        return _across(lambda tensors: torch.cat(tensors, dim=1), self.values)

    def some(self, which: Sequence[int]) -> Activations:
        """These branches' values, each as often as it is named."""
        if list(which) == list(range(self.count)):
            return self
        values = self.listed()
        return Activations([values[branch] for branch in which])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """Every tensor changed by a function that keeps its shape."""
        if self.packed is not None:
            return Activations(packed=each(change, self.packed), count=self.count)
        return Activations([each(change, value) for value in self.values])

    def stacked(self) -> Value:
        """All branches' tensors along a new dim 1: (N, branches, ...)."""
        if isinstance(self.packed, Tensor):
            return self.packed.unflatten(1, (self.count, -1))
        return _across(lambda tensors: torch.stack(tensors, dim=1), self.listed())

    @classmethod
    def unstacked(cls, stacked: Value) -> Activations:
        """From what `stacked` returned."""
        if isinstance(stacked, Tensor):
            return cls(list(stacked.unbind(1)))
        return cls(list(zip(*(tensor.unbind(1) for tensor in stacked), strict=True)))

    def first_tensor(self) -> Tensor:
        """Any tensor of these: they share device and type."""
        value = self.values[0] if self.packed is None else self.packed
        return value if isinstance(value, Tensor) else value[0]


def _across(combine: Callable[[list[Any]], Any], values: Sequence[Value]) -> Value:
    """Combine the branches' tensors, or each of the values that cross."""
    if isinstance(values[0], Tensor):
        return combine(list(values))
    return tuple(combine(list(parts)) for parts in zip(*values, strict=True))


def each(change: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Change a tensor, or each of the tensors that cross."""
    if isinstance(value, tuple):
        return tuple(each(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _siblings(parents: Sequence[int]) -> int:
    """How many successive branches read each input, if that is the same number for all; else 0."""
    first, siblings = parents[0], len(parents) // (parents[-1] - parents[0] + 1)
    return siblings if list(parents) == [first + branch // siblings for branch in range(len(parents))] else 0


def _next_larger(plan: Mapping[tuple[int, int], int], wanted: tuple[int, int]) -> int:
    """What was found for these branches and this batch, or for the next larger that were measured, or the largest."""
    found = plan.get(wanted)
    if found is None:
        covering = [key for key in plan if key[0] >= wanted[0] and key[1] >= wanted[1]]
        found = plan[min(covering, default=max(plan))]
    return min(found, wanted[0])


class Level(nn.Module):
    """One block in `branches` independent copies.

    Args:
        block: the block, as `hierens.cutting` makes it, with the branches' parameters packed (see `Level.of`).
        branches: how many there are.
        scalars: names of the values that have no dimensions in a single branch.

    Attributes:
        block: the block's module tree, with packed parameters if there are two or more branches.
        branches: number of copies.
        size: weights and statistics of one copy.
        looped_because: why the level has no grouped form; empty if it has one.
        plan: how many branches to run in one call, by their number and the batch size, as `hierens.tuning` measured.
        frozen: whether its weights are never trained, as after `fuse`.
    """

    def __init__(self, block: fx.GraphModule, branches: int, scalars: frozenset[str]) -> None:
        super().__init__()
        self.block, self.branches, self.scalars = block, branches, scalars
        self.executor: Executor = "auto"
        self.looped_because = ""
        self.frozen = False
        self.plan: dict[tuple[int, int], int] = {}
        self.constants = nn.Module()
        self._packed: list[Packed] = []  # in a list, so that deep copies keep it beside the block, unregistered
        self.size = sum(tensor.numel() for _, tensor in state_of(block)) // branches  # weights of one
        self._caches = caches_of(block)

    @classmethod
    def of(cls, block: fx.GraphModule, states: Sequence[Mapping[str, Tensor]]) -> Level:
        """A level of a block, which it takes over, and the state dict of each branch, by the block's own names."""
        for name, tensor in list(state_of(block)):
            own = [state[name] for state in states]
            replace(block, name, tensor, own[0] if len(states) == 1 else concatenate(own))
        return cls(block, len(states), frozenset(name for name, tensor in states[0].items() if tensor.ndim == 0))

    def forward(self, x: Activations, parents: Sequence[int] | None = None) -> Activations:
        """Run the first branches.

        Args:
            x: their inputs.
            parents: which input each branch reads, for siblings read the same one; the i-th by default.
        """
        parents = range(x.count) if parents is None else parents
        together = self._together(x, len(parents))
        if not together:
            values, states = x.some(parents).listed(), self.states(len(parents))
            return Activations([self._call(state, v) for state, v in zip(states, values, strict=True)])
        starts = range(0, len(parents), together)
        runs = [self._packed_run(x, parents[start : start + together], start) for start in starts]
        return runs[0] if len(runs) == 1 else Activations([value for run in runs for value in run.listed()])

    def _packed_run(self, x: Activations, parents: Sequence[int], start: int) -> Activations:
        """Run some branches in one call of the packed form."""
        siblings = _siblings(parents)
        family = x.some(range(parents[0], parents[-1] + 1)) if siblings else x.some(parents)
        width = Width(len(parents), self.branches, start, siblings or 1)
        return Activations(packed=self._packed[0](family.side_by_side(), width, self.training), count=len(parents))

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
        without_gradients = self.frozen or not torch.is_grad_enabled()
        if self.branches > 1 and self._packed and self.executor != "looped" and without_gradients:
            return self._packed[0](value, Width(1, self.branches, branch), self.training)
        return self._call(self.states(branch + 1, start=branch)[0], value)

    def states(self, stop: int, start: int = 0) -> list[dict[str, Tensor]]:
        """The weights of branches `start` to `stop`, as views; nothing to put in place for a level of one branch."""
        if self.branches == 1:
            return [{}]
        return branch_states(self.block, self.scalars, self.branches, stop, start)

    def weights(self, stop: int) -> list[dict[str, Tensor]]:
        """The weights of the first `stop` branches, as views, also for a level of one branch."""
        return self.states(stop) if self.branches > 1 else [dict(state_of(self.block))]

    def _call(self, state: dict[str, Tensor], value: Value) -> Value:
        args = value if isinstance(value, tuple) else (value,)
        forget(self._caches)
        return functional_call(self.block, state, args) if state else self.block(*args)

    def _together(self, x: Activations, count: int) -> int:
        """How many branches to run in one call of the packed form; 0: loop over the block itself."""
        if self.branches == 1 or not self._packed or self.executor == "looped":
            return 0
        if self.executor == "grouped":
            return count
        without_gradients = self.frozen or not torch.is_grad_enabled()
        if self.plan and without_gradients:
            return _next_larger(self.plan, (count, x.first_tensor().shape[0]))
        # On CPUs only small layers gain, and those not at all that work per sample.
        light = self.size <= (_LIGHT_FROZEN if self.frozen else _LIGHT)
        gains = x.first_tensor().device.type != "cpu" or (light and self._packed[0].channelwise)
        return count if gains else int(without_gradients)  # the backward pass of slices would be slow

    def group(self) -> None:
        """Take up the grouped form, if the block has one; `looped_because` tells otherwise."""
        self._packed, self.constants = [], nn.Module()
        try:
            self._packed, self.looped_because = [Packed(self.block, self.scalars, self.constants)], ""
        except PackError as error:
            self.looped_because = str(error)

    def loop(self, because: str) -> None:
        """Give up the grouped form for a reason."""
        self._packed, self.looped_because = [], because

    @property
    def grouped(self) -> bool:
        """Whether the block has a grouped form."""
        return bool(self._packed)

    @property
    def channelwise(self) -> bool:
        """Whether the grouped form keeps the branches side by side in channels, but into a last linear layer."""
        return self.grouped and self._packed[0].channelwise

    @property
    def looped_layers(self) -> dict[str, str]:
        """Modules that a grouped level calls once per branch, in place, and why."""
        return self._packed[0].looped if self._packed else {}

    def narrowed(self, branches: int) -> Level:
        """A level with copies of the first `branches` branches only, run the same way."""
        names = [name for name, _ in state_of(self.block)]
        with torch.no_grad():
            block = copy.deepcopy(self.block)
            level = Level.of(block, [{name: state[name].clone() for name in names} for state in self.weights(branches)])
        level.executor, level.frozen = self.executor, self.frozen
        if self._packed:
            level.group()
        else:
            level.loop(self.looped_because)
        return level

    def replace(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Put a new module in place of the one called `name`, given one for every branch."""
        owner, _, key = name.rpartition(".")
        packed = copy.deepcopy(modules[0])
        setattr(self.block.get_submodule(owner), key, packed)
        for tensor_name, tensor in state_of(packed):
            own = [dict(state_of(module))[tensor_name] for module in modules]
            replace(packed, tensor_name, tensor, own[0] if self.branches == 1 else concatenate(own))
        if self._packed:
            self.group()

    def extra_repr(self) -> str:
        """How many branches, and how they are run."""
        return f"branches={self.branches}, " + (f"looped: {self.looped_because}" if self.looped_because else "grouped")
