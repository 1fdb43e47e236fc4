"""A level of the tree: one block in several independent copies, its branches, each an ordinary module.

There are two ways to run a level:

- looped: each branch is called. Always available; it defines what is right.
- grouped: `hierens.branches.grouped_block` runs several branches in one call: all of them, or for inference a few at a
  time, whichever is fastest. At conversion `hierens.branches.check.self_check` compares it with the loop, and a block
  for which they differ is looped. The grouped form is derived from the branches' own modules when it runs, and not used
  where it would not do what they do (`hierens.branches.grouped_form`).
"""

from __future__ import annotations

import copy
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hierens.branches.grouped_form import GroupedForm, kind_of
from hierens.branches.tensors import BranchSlice, concatenate, lay, state_of
from hierens.core.values import Value, each

Executor = Literal["auto", "looped", "grouped"]
# Weights per branch up to which one grouped call beats a loop on CPUs (docs/architecture.md).
LIGHT, LIGHT_FROZEN = 1_000_000, 4_000_000
# Values of a batch, for one branch, up to which one call of batched products beats a loop on GPUs.
MANY_TOKENS = 2_000_000
_MOST_FORMS = 3  # that a level keeps: for evaluation, for training, and for some layers frozen
_PACKED = re.compile(r"(networks\.)?(levels\.\d+|head|classifier)\.block\.")
_FINDING = threading.RLock()


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


class AnyLevel(nn.Module):
    """What levels have in common, whatever holds their weights.

    Attributes:
        executor: how it is run: `looped`, `grouped` where it can be, or `auto`, by device and batch size.
        fallback_reason: why the level has no grouped form; empty if it has one.
        plan: how many branches to run in one call, by their number and the batch size, as `hierens.models.tuning`
            measured.
        size: weights and statistics of one branch.
    """

    executor: Executor
    fallback_reason: str
    plan: dict[tuple[int, int], int]
    size: int
    light = LIGHT

    @property
    @abstractmethod
    def branches(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def channelwise(self) -> bool:
        """Whether the grouped form keeps the branches side by side in channels, but into a last linear layer."""

    @abstractmethod
    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""

    @abstractmethod
    def first(self) -> Any:
        """The module of the first branch, of a level that has one branch."""

    @abstractmethod
    def narrowed(self, branches: int) -> AnyLevel:
        """A level with copies of the first `branches` branches only, run the same way."""

    @abstractmethod
    def grouped_form(self, start: int = 0, stop: int | None = None) -> Callable[[Value, BranchSlice], Value] | None:
        """What runs branches `start` to `stop` in one call; None where only a loop does what they do."""

    @property
    def grouped(self) -> bool:
        """Whether the block has a grouped form."""
        return not self.fallback_reason

    def loop(self, because: str) -> None:
        """Give up the grouped form for a reason."""
        self.fallback_reason = because

    def without_gradients(self) -> bool:
        """Whether nothing will be differentiated with respect to the weights."""
        return not torch.is_grad_enabled()

    def forward(self, x: Activations, parents: Sequence[int] | None = None) -> Activations:
        """Run the first branches.

        Args:
            x: their inputs.
            parents: which input each branch reads, for siblings read the same one; the i-th by default.
        """
        parents = range(x.count) if parents is None else parents
        together = self._together(x, len(parents))
        if together < 2:
            values = x.some(parents).listed()
            return Activations([self.run_branch(branch, value) for branch, value in enumerate(values)])
        runs = [self._run(x, parents[start : start + together], start) for start in range(0, len(parents), together)]
        return runs[0] if len(runs) == 1 else Activations([value for run in runs for value in run.listed()])

    def _run(self, x: Activations, parents: Sequence[int], start: int) -> Activations:
        """Run some branches in one call if they can be."""
        form = self.grouped_form(start, start + len(parents)) if len(parents) > 1 else None
        if form is None:
            values = x.some(parents).listed()
            return Activations([self.run_branch(start + i, value) for i, value in enumerate(values)])
        siblings = _siblings(parents)
        family = x.some(range(parents[0], parents[-1] + 1)) if siblings else x.some(parents)
        width = BranchSlice(len(parents), self.branches, start, siblings or 1, self.laid)
        return Activations(packed=form(family.side_by_side(), width), count=len(parents))

    @property
    def laid(self) -> bool:
        """Whether the branches' tensors lie one after another in memory."""
        return True

    def _together(self, x: Activations, count: int) -> int:
        """How many branches to run in one call; less than 2: loop."""
        if count == 1 or not self.grouped or self.executor == "looped":
            return 0
        if self.executor == "grouped":
            return count
        if self.plan and self.without_gradients():
            return _next_larger(self.plan, (count, x.first_tensor().shape[0]))
        return count if self._gains(x.first_tensor(), x.count if x.packed is not None else 1) else 0

    def _gains(self, x: Tensor, branches: int) -> bool:
        """Whether one call is faster than a loop, for inputs of so many branches in one tensor."""
        if x.device.type == "cpu":  # only small layers gain, and those not at all that work per sample
            return self.size <= self.light and self.channelwise
        # On a GPU a small call waits for its launches, of which grouping needs fewer; large batched products are slower
        # than a loop's, by up to 2.0 times for ViT-Tiny on an H200 (docs/results/gpu.md).
        return self.channelwise or x.numel() // branches <= MANY_TOKENS

    def extra_repr(self) -> str:
        """How many branches, and how they are run."""
        return f"branches={self.branches}, " + (
            f"looped: {self.fallback_reason}" if self.fallback_reason else "grouped"
        )


class Level(AnyLevel, nn.ModuleList):
    """One block in several independent copies, each an ordinary module: `level[branch]`.

    The branches' tensors of one layer lie one after another in memory wherever they can, so that a grouped call needs
    no copy of them; each is an ordinary tensor nevertheless.
    """

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        """A level of these branches, which it takes over: copies of one block, with weights of their own."""
        super().__init__(branches)
        self.executor, self.fallback_reason, self.plan = "auto", "", {}
        self.size = sum(tensor.numel() for _, tensor in state_of(self[0]))
        self.known = {name: kind_of(module) for name, module in self[0].named_modules()}
        self._forms: list[GroupedForm] = []
        self._wholes: dict[str, Tensor] = {}
        self.lay()

    @property
    def branches(self) -> int:
        """How many there are."""
        return len(self)

    def _graphs(self) -> list[Any]:
        return list(self)

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
        return self[branch](*value) if isinstance(value, tuple) else self[branch](value)

    def first(self) -> Any:
        """See `AnyLevel.first`."""
        return self[0]

    def grouped_form(self, start: int = 0, stop: int | None = None) -> Callable[[Value, BranchSlice], Value] | None:
        """See `AnyLevel.grouped_form`."""
        form = self._form(start, stop)
        if form is None or form.packed is None or torch_module._has_any_global_hook():
            return None
        if not form.laid and (form.moves or self.executor != "grouped"):
            return None  # running statistics of tensors put together for a call would be lost
        return form.packed

    def _form(self, start: int = 0, stop: int | None = None) -> GroupedForm | None:
        """The grouped form of the branches as they are; a compiler takes the last one that was found."""
        if torch.compiler.is_compiling():
            return self._forms[0] if self._forms else None
        forms = self._forms
        if forms and forms[0].holds(start, stop):
            return forms[0]
        with _FINDING:
            found = next((form for form in forms if form.holds()), None) or GroupedForm(
                self._graphs(), self.known, self._wholes
            )
            self._forms = [found, *(form for form in forms if form is not found)][:_MOST_FORMS]
        return found

    @property
    def laid(self) -> bool:
        """Whether the branches' tensors lie one after another in memory."""
        return not torch.compiler.is_compiling() and bool(self._forms) and self._forms[0].laid

    def group(self) -> None:
        """Find the grouped form now; `fallback_reason` tells if there is none."""
        form = self._form() if self.branches > 1 else None
        self.fallback_reason = form.because if form else ""

    @property
    def channelwise(self) -> bool:
        """Whether the grouped form keeps the branches side by side in channels, but into a last linear layer."""
        form = self._forms[0] if self._forms else self._form()  # what it was last time: that is only to choose a way
        return bool(form and form.packed and form.packed.channelwise)

    @property
    def looped_layers(self) -> dict[str, str]:
        """Modules that a grouped level calls once per branch, in place, and why."""
        form = self._form() if self.grouped else None
        return form.packed.looped if form and form.packed else {}

    def narrowed(self, branches: int) -> Level:
        """A level with copies of the first `branches` branches only, run the same way."""
        level = Level(copy.deepcopy(self[branch]) for branch in range(branches))
        level.executor, level.fallback_reason, level.known = self.executor, self.fallback_reason, self.known
        return level

    def lay(self) -> None:
        """Let the branches' tensors of each layer lie one after another in memory, wherever they can."""
        self._wholes = lay(list(self), self._wholes)

    def replace(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Put a new module in the place of the one called `name`, one for every branch."""
        owner, _, key = name.rpartition(".")
        for branch, module in zip(self, modules, strict=True):
            setattr(branch.get_submodule(owner), key, module)
        self.lay()

    def reorder(self, sources: Sequence[int]) -> None:
        """Put branch `sources[i]` in place i, for every place."""
        branches = [self[source] for source in sources]
        for place, branch in enumerate(branches):
            self[place] = branch
        self.lay()

    # --- what torch does to modules ---------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Level:
        """As every module's; the grouped form of the mode is found now, since a compiler cannot find it."""
        super().train(mode)
        if self.branches > 1 and self.grouped and not self.is_meta:
            self._form()
        return self

    @property
    def is_meta(self) -> bool:
        """Whether there are no values."""
        return any(parameter.is_meta for parameter in self.parameters())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Level:
        super()._apply(fn, recurse)
        self.lay()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is derived from the branches."""
        return {**self.__dict__, "_forms": [], "_wholes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lay()

    def __deepcopy__(self, memo: dict[int, Any]) -> Level:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return other

    def rename_packed(self, state: dict[str, Any], prefix: str) -> None:
        """Rename, in place, what files of the first layout hold: weights packed along dim 0, under `block.`.

        Args:
            state: tensors by name; those of other levels are left.
            prefix: what begins the names of this level's tensors.
        """
        for name, own in state_of(self[0]):
            packed = state.get(f"{prefix}block.{name}")
            if packed is None or (packed.ndim and packed.shape[0] % self.branches):
                continue  # what belongs to another model loading refuses
            alone = [packed] if self.branches == 1 else packed.chunk(self.branches)
            del state[f"{prefix}block.{name}"]
            for branch, tensor in enumerate(alone):
                state[f"{prefix}{branch}.{name}"] = tensor.view(()) if own.ndim == 0 else tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.rename_packed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def in_first_layout(names: Iterable[str]) -> bool:
    """Whether tensors have the names of the first layout, in which levels were packed."""
    return any(_PACKED.match(name) for name in names)


def first_layout(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name, as the first layout had them: a level's packed along dim 0."""
    state = dict(model.state_dict())
    for prefix, level in model.named_modules():
        if isinstance(level, Level):
            for name, _ in state_of(level[0]):
                own = [state.pop(f"{prefix}.{branch}.{name}") for branch in range(level.branches)]
                state[f"{prefix}.block.{name}"] = own[0] if len(own) == 1 else concatenate(own)
    return state


def copies(block: nn.Module, states: Iterable[Mapping[str, Tensor]]) -> list[nn.Module]:
    """Copies of a block, each with the weights of one state dict, by the block's own names."""
    made = []
    for state in states:
        branch = copy.deepcopy(block)
        with torch.no_grad():
            for name, tensor in state_of(branch):
                tensor.copy_(state[name])
        made.append(branch)
    return made
