"""The base class of levels: it chooses how many branches to run in one call.

A level holds one block in several independent copies, its branches. There are two executors:

- looped: each branch is called. Always available, and the reference for correctness.
- grouped: several branches run in one call: all of them, or for inference a few at a time, whichever is fastest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.light import light_layers
from hierens.branches.tensors import BranchSlice
from hierens.core.block_values import Value

Executor = Literal["auto", "looped", "grouped"]
# Weights per branch up to which one grouped call is faster than a loop on CPUs (docs/architecture.md).
GROUPED_WEIGHTS, FUSED_GROUPED_WEIGHTS = 1_000_000, 4_000_000
# Input values per branch up to which batched products are faster than a loop on GPUs.
BATCHED_VALUES = 2_000_000


class AnyLevel(nn.Module):
    """The interface of all levels, with separate or packed weights.

    Attributes:
        executor: `looped`, `grouped` (where possible), or `auto`: chosen by device and batch size.
        fallback_reason: why the level has no grouped form; empty if it has one.
        plan: branches per call, by number of branches and batch size, as measured by `hierens.models.tuning`.
        size: weights and statistics of one branch.
        grouped_weights: `auto` groups levels with at most this many weights per branch on CPUs.
    """

    executor: Executor
    fallback_reason: str
    plan: dict[tuple[int, int], int]
    size: int
    grouped_weights = GROUPED_WEIGHTS

    @property
    @abstractmethod
    def branches(self) -> int:
        """Number of branches."""

    @property
    @abstractmethod
    def channelwise(self) -> bool:
        """Whether the grouped form keeps the branches side by side in channels, except before a last linear layer."""

    @abstractmethod
    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""

    @abstractmethod
    def first(self) -> Any:
        """The module of the first branch, for levels with one branch."""

    @abstractmethod
    def first_branches(self, branches: int) -> AnyLevel:
        """A level with copies of the first `branches` branches and the same executor."""

    @abstractmethod
    def grouped_form(self, start: int = 0, stop: int | None = None) -> Callable[[Value, BranchSlice], Value] | None:
        """A function that runs branches `start` to `stop` in one call; None if only a loop gives their results."""

    def parameters_of(self, branches: int) -> int:
        """Number of parameters of a level with only so many of the branches."""
        shared = sum({layer.weight: layer.weight.numel() for _, layer in light_layers(self)}.values())
        return shared + branches * (sum(map(Tensor.numel, self.parameters())) - shared) // self.branches

    @property
    def grouped(self) -> bool:
        """Whether the block has a grouped form."""
        return not self.fallback_reason

    def loop(self, reason: str) -> None:
        """Disable the grouped form, for this reason."""
        self.fallback_reason = reason

    def without_gradients(self) -> bool:
        """Whether no gradients with respect to the weights are recorded."""
        return not torch.is_grad_enabled()

    def forward(self, x: Activations, parents: Sequence[int] | None = None) -> Activations:
        """Run the first branches.

        Args:
            x: their inputs.
            parents: the index of the input of each branch (siblings have the same input); by default i for branch i.
        """
        parents = range(x.count) if parents is None else parents
        per_call = self._branches_per_call(x, len(parents))
        if per_call < 2:
            values = x.some(parents).listed()
            return Activations([self.run_branch(branch, value) for branch, value in enumerate(values)])
        runs = [self._run(x, parents[start : start + per_call], start) for start in range(0, len(parents), per_call)]
        return runs[0] if len(runs) == 1 else Activations([value for run in runs for value in run.listed()])

    def _run(self, x: Activations, parents: Sequence[int], start: int) -> Activations:
        """Run some branches, in one call if possible."""
        form = self.grouped_form(start, start + len(parents)) if len(parents) > 1 else None
        if form is None:
            values = x.some(parents).listed()
            return Activations([self.run_branch(start + i, value) for i, value in enumerate(values)])
        siblings = _siblings(parents)
        inputs = x.some(range(parents[0], parents[-1] + 1)) if siblings else x.some(parents)
        width = BranchSlice(len(parents), self.branches, start, siblings or 1, self.contiguous)
        return Activations(packed=form(inputs.side_by_side(), width), count=len(parents))

    @property
    def contiguous(self) -> bool:
        """Whether the branches' tensors are adjacent in memory."""
        return True

    def _branches_per_call(self, x: Activations, count: int) -> int:
        """How many of `count` branches to run in one call; 1 stands for a loop."""
        if count == 1 or not self.grouped or self.executor == "looped":
            return 1
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # the trace of a grouped call would be for one batch size
            return 1
        if self.executor == "grouped":
            return count
        if self.plan and self.without_gradients():
            return _next_larger(self.plan, (count, x.first_tensor().shape[0]))
        return count if self._grouping_is_faster(x.first_tensor(), x.count if x.packed is not None else 1) else 1

    def _grouping_is_faster(self, x: Tensor, branches: int) -> bool:
        """Whether one call is faster than a loop for a tensor that holds the inputs of so many branches."""
        if x.device.type == "cpu":  # only small layers gain, and per-sample operations do not
            return self.size <= self.grouped_weights and self.channelwise
        # On a GPU, small calls are limited by kernel launches, of which grouping needs fewer. Large batched products
        # are slower than a loop's, by up to 2.0 times for ViT-Tiny on an H200 (docs/results/gpu.md).
        return self.channelwise or x.numel() // branches <= BATCHED_VALUES

    def extra_repr(self) -> str:
        """The number of branches and the executor."""
        executor = f"looped: {self.fallback_reason}" if self.fallback_reason else "grouped"
        return f"branches={self.branches}, {executor}"


def _siblings(parents: Sequence[int]) -> int:
    """How many consecutive branches read each input; 0 if the number varies."""
    first, siblings = parents[0], len(parents) // (parents[-1] - parents[0] + 1)
    return siblings if list(parents) == [first + branch // siblings for branch in range(len(parents))] else 0


def _next_larger(plan: Mapping[tuple[int, int], int], wanted: tuple[int, int]) -> int:
    """The plan for these (branches, batch size), or for the next larger that were measured, or for the largest."""
    found = plan.get(wanted)
    if found is None:
        covering = [key for key in plan if key[0] >= wanted[0] and key[1] >= wanted[1]]
        found = plan[min(covering, default=max(plan))]
    return min(found, wanted[0])
