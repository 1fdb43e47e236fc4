"""A level of a fused model: one block with the weights of all its branches packed, for inference alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from hierens.branches.grouped_block import Packed
from hierens.branches.level import LIGHT_FROZEN, AnyLevel
from hierens.branches.tensors import BranchSlice, PackedLayer, replace, state_of
from hierens.core.values import Value


class Apart(nn.ModuleList):
    """A layer without a packed form: the module of each branch, to be called in its place."""


class FusedLevel(AnyLevel):
    """One block in several copies whose weights are packed (`hierens.branches.tensors`); it is never trained.

    Attributes:
        block: the block's layers, each with the tensors of all branches, or `Apart`.
    """

    light = LIGHT_FROZEN

    def __init__(self, block: fx.GraphModule, branches: int, scalars: frozenset[str]) -> None:
        """A level of a packed block.

        Args:
            block: which it takes over.
            branches: how many the weights are of.
            scalars: names of the tensors that have no dimensions in a single branch.
        """
        super().__init__()
        self.block, self.count, self.scalars = block, branches, scalars
        self.executor, self.fallback_reason, self.plan = "auto", "", {}
        self.size = sum(tensor.numel() for _, tensor in state_of(block)) // branches
        self._pack()

    def _pack(self) -> None:
        apart = {name: f"{type(module[0]).__name__} has no packed form" for name, module in apart_in(self.block)}
        self._packed = Packed(_PackedLayers(self), apart) if self.count > 1 else None

    @property
    def branches(self) -> int:
        """How many there are."""
        return self.count

    def without_gradients(self) -> bool:
        """Always: see `AnyLevel.without_gradients`."""
        return True

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
        if self._packed is None:
            return self.block(*value) if isinstance(value, tuple) else self.block(value)
        return self._packed(value, BranchSlice(1, self.count, branch))

    def first(self) -> Any:
        """See `AnyLevel.first`."""
        return self.block

    def grouped_form(self, start: int = 0, stop: int | None = None) -> Callable[[Value, BranchSlice], Value] | None:
        """See `AnyLevel.grouped_form`."""
        return self._packed

    @property
    def channelwise(self) -> bool:
        """See `AnyLevel.channelwise`."""
        return self._packed is None or self._packed.channelwise

    @property
    def looped_layers(self) -> dict[str, str]:
        """Layers that are called once per branch, in place, and why."""
        return self._packed.looped if self._packed else {}

    @torch.no_grad()
    def narrowed(self, branches: int) -> FusedLevel:
        """A level with the weights of the first `branches` branches only, run the same way."""
        return self.part(0, branches)

    @torch.no_grad()
    def part(self, start: int, stop: int) -> FusedLevel:
        """A level with the weights of branches `start` to `stop` only, run the same way."""
        block, width = copy.deepcopy(self.block), BranchSlice(stop - start, self.count, start)
        for name, tensor in packed_state(block):
            replace(block, name, width.rows(tensor).clone(memory_format=torch.preserve_format))
        for name, module in apart_in(block):
            own = width.chosen(list(module))
            block.set_submodule(name, own[0] if len(own) == 1 else Apart(own))
        level = FusedLevel(block, stop - start, self.scalars)
        level.executor = self.executor
        return level

    def __getstate__(self) -> dict[str, Any]:
        """Without what is derived from the block."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class _PackedLayers:
    """The layers of a packed block, as `hierens.branches.rewrite.Layers`."""

    def __init__(self, level: FusedLevel) -> None:
        self.block: nn.Module = level.block
        self.scalars = level.scalars
        self._own = {name for name, _ in packed_state(level.block)}

    def layer(self, name: str) -> PackedLayer:
        """A layer of all branches."""
        prefix = f"{name}." if name else ""
        own = frozenset(n.removeprefix(prefix) for n in self.scalars if n.startswith(prefix))
        return PackedLayer(self.block.get_submodule(name), own)

    def modules(self, name: str) -> list[nn.Module]:
        """Each branch's own module."""
        module = self.block.get_submodule(name)
        assert isinstance(module, Apart)
        return list(module)

    def per_branch(self, name: str) -> bool:
        """Whether a tensor differs from branch to branch."""
        return name in self._own


def apart_in(block: nn.Module) -> list[tuple[str, Apart]]:
    """The layers of a block that each branch has for itself, by name."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, Apart)]


def packed_state(block: nn.Module) -> list[tuple[str, Tensor]]:
    """The packed tensors of a block by name."""
    apart = tuple(f"{name}." for name, _ in apart_in(block))
    return [(name, tensor) for name, tensor in state_of(block) if not name.startswith(apart)]
