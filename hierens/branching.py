"""A level of the tree: one block in several independent copies, its branches.

A level keeps the block's own module tree, in which every parameter and persistent buffer holds all branches' values
concatenated along dim 0, branch by branch. So the first w branches are a view, `ndim` and names are the backbone's,
and the state dict does not depend on how the level is run. There are two ways to run it:

- looped: the block is called once per branch, with that branch's slices put in place of its weights. Always available;
  it defines what is right.
- grouped: `hierens.packing` runs all branches in one call. A block earns it at conversion by `self_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from hierens.packing import PackError, Width, pack

Executor = Literal["auto", "looped", "grouped"]
Value = Any  # what one branch hands on: a tensor, or the tuple of values that cross a cut
_LIGHT = 1_000_000  # weights per branch up to which one grouped call beats a loop on CPUs (docs/architecture.md)


class Activations:
    """What the first branches of a level hand on: one value per branch, or one tensor with all side by side.

    The two forms turn into each other on demand, so that a run of levels with the same executor copies nothing.
    """

    def __init__(self, values: Sequence[Value] = (), packed: Tensor | None = None, count: int = 0) -> None:
        self.values, self.packed = list(values), packed
        self.count = count or len(self.values)

    def listed(self) -> list[Value]:
        """One value per branch."""
        if self.packed is None:
            return self.values
        return list(self.packed.chunk(self.count, dim=1))

    def side_by_side(self) -> Tensor:
        """One tensor (N, branches*C, ...)."""
        if self.packed is not None:
            return self.packed
        return self.values[0] if self.count == 1 else torch.cat(self.values, dim=1)

    def fork(self, parents: Sequence[int]) -> Activations:
        """The inputs of the next level's branches, given the branch of this level that feeds each."""
        if list(parents) == list(range(self.count)):
            return self
        values = self.listed()
        return Activations([values[parent] for parent in parents])

    def stacked(self) -> Tensor:
        """All branches' tensors along a new dim 1: (N, branches, ...)."""
        if self.packed is not None:
            return self.packed.unflatten(1, (self.count, -1))
        return torch.stack(self.values, dim=1)


class Level(nn.Module):
    """One block in `branches` independent copies.

    Args:
        block: the block, as `hierens.cutting` makes it.
        states: the state dict of each branch, by the block's own names.

    Attributes:
        block: the block's module tree, with packed parameters if there are two or more branches.
        branches: number of copies.
        looped_because: why the level has no grouped form; empty if it has one.
    """

    def __init__(self, block: fx.GraphModule, states: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.block, self.branches = block, len(states)
        self.executor: Executor = "auto"
        self.looped_because = ""
        self._grouped: list[fx.GraphModule] = []  # in a list, so that its modules are not registered twice
        self.scalars = frozenset(name for name, tensor in states[0].items() if tensor.ndim == 0)
        self.light = sum(tensor.numel() for tensor in states[0].values()) <= _LIGHT
        for name, tensor in list(_state(block)):
            own = [state[name] for state in states]
            _replace(block, name, tensor, own[0] if self.branches == 1 else self._concatenate(own))

    @staticmethod
    def _concatenate(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if tensors[0].ndim == 0 else torch.cat(tensors)

    def forward(self, x: Activations) -> Activations:
        """Run the first `x.count` branches, each on its own input."""
        if self.branches > 1 and self._runs_grouped(x):
            width = Width(x.count, self.branches)
            return Activations(packed=self._grouped[0](x.side_by_side(), width), count=x.count)
        values = x.listed()
        return Activations([self._call(state, v) for state, v in zip(self.states(x.count), values, strict=True)])

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
        return self._call(next(self.states(branch + 1, start=branch)), value)

    def states(self, stop: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The weights of branches `start` to `stop`, as views; nothing to put in place for a level of one branch."""
        if self.branches == 1:
            return iter([{}])
        split = {name: self._split(name, tensor, start, stop) for name, tensor in _state(self.block)}
        return ({name: parts[i] for name, parts in split.items()} for i in range(stop - start))

    def _split(self, name: str, tensor: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        # One split per parameter, not a slice per branch: its backward is a single concatenation.
        rows = tensor.shape[0] // self.branches
        own = tensor if (start, stop) == (0, self.branches) else tensor[start * rows : stop * rows]
        return own.unbind() if name in self.scalars else own.split(rows)

    def _call(self, state: dict[str, Tensor], value: Value) -> Value:
        args = value if isinstance(value, tuple) else (value,)
        return functional_call(self.block, state, args) if state else self.block(*args)

    def _runs_grouped(self, x: Activations) -> bool:
        if not self._grouped or self.executor == "looped":
            return False
        if self.executor == "grouped":
            return True
        tensor = x.packed if x.packed is not None else x.values[0]
        return tensor.device.type != "cpu" or self.light

    def group(self) -> None:
        """Take up the grouped form, if the block has one; `looped_because` tells otherwise."""
        self._grouped = []
        try:
            self._grouped, self.looped_because = [pack(self.block)], ""
        except PackError as error:
            self.looped_because = str(error)

    def loop(self, because: str) -> None:
        """Give up the grouped form for a reason."""
        self._grouped, self.looped_because = [], because

    def narrowed(self, branches: int) -> Level:
        """A level with copies of the first `branches` branches only, run the same way."""
        names = [name for name, _ in _state(self.block)]
        with torch.no_grad():
            block = copy.deepcopy(self.block)
            states = list(self.states(branches)) if self.branches > 1 else [dict(_state(block))]
            level = Level(block, [{name: state[name].clone() for name in names} for state in states])
        level.executor = self.executor
        if self._grouped:
            level.group()
        else:
            level.loop(self.looped_because)
        return level

    def replace(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Put a new module in place of the one called `name`, given one for every branch."""
        owner, _, key = name.rpartition(".")
        packed = copy.deepcopy(modules[0])
        setattr(self.block.get_submodule(owner), key, packed)
        for tensor_name, tensor in _state(packed):
            own = [dict(_state(module))[tensor_name] for module in modules]
            _replace(packed, tensor_name, tensor, own[0] if self.branches == 1 else self._concatenate(own))
        if self._grouped:
            self.group()

    def extra_repr(self) -> str:
        """How many branches, and how they are run."""
        return f"branches={self.branches}, " + (f"looped: {self.looped_because}" if self.looped_because else "grouped")


def self_check(block: fx.GraphModule, example: Value, seed: int = 0) -> str:
    """Why the grouped form of a block may not be used; an empty string if it agrees with the looped one.

    Three branches with independent weights and inputs are run both ways in float64, in evaluation and in training
    (dropout off), with two batch sizes and with fewer branches than there are; outputs, running statistics and, as a
    control that must differ, outputs on exchanged inputs are compared.

    Args:
        block: a block of a cutting; it is left as it is.
        example: what enters it, for one image.
        seed: of the random weights and inputs.
    """
    if not isinstance(example, Tensor):
        return "several values cross into the block"
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(block).to("cpu", torch.float64)
    states = [_perturbed(probe, generator) for _ in range(3)]
    looped = Level(probe, states)
    looped.group()
    if looped.looped_because:
        return looped.looped_because
    looped.executor = "looped"
    for training, batch, count in ((False, 2, 3), (True, 3, 2)):
        shape = (batch, *example.shape[1:])
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        if because := _disagreement(looped, inputs, training):
            return because
    return ""


def _disagreement(looped: Level, inputs: list[Tensor], training: bool) -> str:
    """What differs between the two ways to run a level on the same inputs."""
    grouped = copy.deepcopy(looped)
    grouped.executor = "grouped"
    for level in (looped, grouped):
        level.train(training)
        for module in level.modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
    mode = "training" if training else "evaluation"
    try:
        with torch.no_grad():
            expected = looped(Activations(inputs)).listed()
            actual = grouped(Activations(inputs)).listed()
            statistics = zip(dict(_state(looped.block)).items(), dict(_state(grouped.block)).items(), strict=True)
            moved = [name for (name, a), (_, b) in statistics if not _close(a, b)]
            exchanged = grouped(Activations(inputs[1:] + inputs[:1])).listed()
    except Exception as error:
        return f"it fails in {mode}: {error}"
    if not all(_close(a, b) for a, b in zip(actual, expected, strict=True)):
        return f"its grouped form differs in {mode}"
    if moved:
        return f"its grouped form leaves other statistics in {', '.join(moved)}"
    if any(torch.equal(a, b) for a, b in zip(actual, exchanged, strict=True)):
        return f"exchanged inputs leave its outputs the same in {mode}, so that nothing can be told"
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10)


def _perturbed(block: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A branch's own weights: none zero, so that no path of the block stays untried."""
    state, parameters = {}, dict(block.named_parameters())
    for name, tensor in _state(block):
        tensor = tensor.detach().clone()
        if name in parameters:
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor += noise * (0.1 + 0.5 * tensor.std(correction=0))
        elif tensor.is_floating_point():  # running variances stay positive
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor = tensor * (1 + noise) + 0.1 * noise
        state[name] = tensor
    return state


def _state(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; constants that are not saved stay shared by all branches."""
    for prefix, module in block.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer


def _replace(block: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = block.get_submodule(owner)
    if isinstance(old, nn.Parameter):
        module._parameters[key] = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    else:
        module._buffers[key] = new.detach()
