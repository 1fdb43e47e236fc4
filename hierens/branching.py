"""A level of the tree: one block in several independent copies, its branches.

A level keeps the block's own module tree, in which every parameter and persistent buffer holds all branches' values
concatenated along dim 0, branch by branch. So the first w branches are a view, `ndim` and names are the backbone's,
and the state dict does not depend on how the level is run. There are two ways to run it:

- looped: the block is called once per branch, with that branch's slices put in place of its weights. Always available;
  it defines what is right.
- grouped: `hierens.packing` runs all branches in one call. A block earns it at conversion by `self_check`.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from hierens.errors import first_line
from hierens.modes import quiet_dropout
from hierens.packed import Width, branch_states, caches_of, concatenate, forget, replace, state_of
from hierens.packing import Packed
from hierens.packing_rules import PackError

Executor = Literal["auto", "looped", "grouped"]
Value = Any  # what one branch hands on: a tensor, or the tuple of values that cross a cut
_HEAVY = 50_000_000  # weights of a block from which float64 would need many GB
_LIGHT = 1_000_000  # weights per branch up to which one grouped call beats a loop on CPUs (docs/architecture.md)


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

    def fork(self, parents: Sequence[int]) -> Activations:
        """The inputs of the next level's branches, given the branch of this level that feeds each."""
        if list(parents) == list(range(self.count)):
            return self
        values = self.listed()
        return Activations([values[parent] for parent in parents])

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
        self.constants = nn.Module()
        self._packed: list[Packed] = []  # in a list, so that deep copies keep it beside the block, unregistered
        self.scalars = frozenset(name for name, tensor in states[0].items() if tensor.ndim == 0)
        self.light = sum(tensor.numel() for tensor in states[0].values()) <= _LIGHT
        self._caches = caches_of(block)
        for name, tensor in list(state_of(block)):
            own = [state[name] for state in states]
            replace(block, name, tensor, own[0] if self.branches == 1 else concatenate(own))

    def forward(self, x: Activations) -> Activations:
        """Run the first `x.count` branches, each on its own input."""
        if self.branches > 1 and self._runs_grouped(x):
            inputs, width = x.side_by_side(), Width(x.count, self.branches)
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            return Activations(packed=self._packed[0](inputs, width, self.training), count=x.count)
        values = x.listed()
        return Activations([self._call(state, v) for state, v in zip(self.states(x.count), values, strict=True)])

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
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

    def _runs_grouped(self, x: Activations) -> bool:
        if not self._packed or self.executor == "looped":
            return False
        if self.executor == "grouped":
            return True
        # On CPUs only small layers gain, and those not at all that work per sample.
        return x.first_tensor().device.type != "cpu" or (self.light and self._packed[0].channelwise)

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
    def looped_layers(self) -> dict[str, str]:
        """Modules that a grouped level calls once per branch, in place, and why."""
        return self._packed[0].looped if self._packed else {}

    def narrowed(self, branches: int) -> Level:
        """A level with copies of the first `branches` branches only, run the same way."""
        names = [name for name, _ in state_of(self.block)]
        with torch.no_grad():
            block = copy.deepcopy(self.block)
            level = Level(block, [{name: state[name].clone() for name in names} for state in self.weights(branches)])
        level.executor = self.executor
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


def self_check(block: fx.GraphModule, example: Value, seed: int = 0) -> str:
    """Why the grouped form of a block may not be used; an empty string if it agrees with the looped one.

    Three branches with independent weights and inputs are run both ways, in evaluation and in training (dropout off),
    with two batch sizes and with fewer branches than there are; outputs and running statistics are compared, and the
    branches, as a control that must differ: in float64, or in float32 where the block insists on that or is so large
    that memory does.

    Args:
        block: a block of a cutting; it is left as it is.
        example: what enters it, for one image.
        seed: of the random weights and inputs.
    """
    values = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point() for value in values):
        return "values other than batches of feature maps cross into it"
    reasons = []
    heavy = sum(parameter.numel() for parameter in block.parameters()) > _HEAVY
    for dtype in (torch.float32,) if heavy else (torch.float64, torch.float32):
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints the code that failed
            because, blamed = _disagreement(block, example, dtype, seed)
        if not blamed:
            return because
        reasons.append(because)
    return reasons[-1]


def _disagreement(block: fx.GraphModule, example: Value, dtype: torch.dtype, seed: int) -> tuple[str, bool]:
    """What differs between the two ways to run a level; and whether that is because even the loop fails."""
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(block).to("cpu", dtype)
    level = Level(probe, [_perturbed(probe, generator) for _ in range(3)])
    level.group()
    if level.looped_because:
        return level.looped_because, False
    statistics = dict(probe.named_buffers())
    for training, batch, count in ((False, 1, 3), (True, 2, 2)):
        mode = "training" if training else "evaluation"
        inputs = [_drawn_like(example, batch, dtype, generator) for _ in range(count)]
        level.train(training)
        quiet_dropout(level)
        before = {name: tensor.clone() for name, tensor in statistics.items()}
        try:
            expected = _run(level, "looped", inputs)
        except Exception as error:
            return f"it fails in {mode}: {first_line(error)}", True
        moved = {name: tensor.clone() for name, tensor in statistics.items()}
        for name, tensor in before.items():
            statistics[name].copy_(tensor)
        try:
            actual = _run(level, "grouped", inputs)
        except Exception as error:
            return f"its grouped form fails in {mode}: {first_line(error)}", False
        if not all(_close(a, b) for a, b in zip(actual, expected, strict=True)):
            return f"its grouped form differs in {mode}", False
        if other := [name for name, tensor in moved.items() if not _close(statistics[name], tensor)]:
            return f"its grouped form leaves other statistics in {', '.join(other)}", False
        if _same(actual[0], actual[1]):
            return f"branches of other weights and inputs agree in {mode}, so that nothing can be told", False
    return "", False


@torch.no_grad()
def _run(level: Level, executor: Executor, inputs: list[Value]) -> list[Value]:
    level.executor = executor
    return level(Activations([_copied(value) for value in inputs])).listed()


def _copied(value: Value) -> Value:
    """A value that the block may change in place."""
    return value.clone() if isinstance(value, Tensor) else tuple(_copied(part) for part in value)


def _drawn_like(example: Value, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Value:
    if isinstance(example, tuple):
        return tuple(_drawn_like(value, batch, dtype, generator) for value in example)
    return torch.randn((batch * example.shape[0], *example.shape[1:]), generator=generator, dtype=dtype)


def _close(a: Value, b: Value) -> bool:
    """Equal but for rounding: in relation to the largest value, since sums may run in another order."""
    if not isinstance(a, Tensor):
        return all(_close(x, y) for x, y in zip(a, b, strict=True))
    if a.shape != b.shape:
        return False
    tolerance = 1e-6 if a.dtype == torch.float64 else 2e-5
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())


def _same(a: Value, b: Value) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(_same(x, y) for x, y in zip(a, b, strict=True))


def _perturbed(block: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A branch's own weights: none zero, so that no path of the block stays untried."""
    state, parameters = {}, dict(block.named_parameters())
    for name, tensor in state_of(block):
        tensor = tensor.detach().clone()
        if name in parameters:
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor += noise * (0.1 + 0.5 * tensor.std(correction=0))
        elif tensor.is_floating_point():  # running variances stay positive
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor = tensor * (1 + noise) + 0.1 * noise
        state[name] = tensor
    return state
