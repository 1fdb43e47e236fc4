"""`FusedLevel`: a level of a fused model, with the weights of all branches packed; for inference only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from hierens.branches.executor import FUSED_GROUPED_WEIGHTS, AnyLevel
from hierens.branches.grouped_block import Packed
from hierens.branches.layer_forms import layer_form
from hierens.branches.light import light_layers, shared_names
from hierens.branches.tensors import BranchSlice, PackedLayer, replace, state_of
from hierens.core.block_values import Value


class UnpackedLayer(nn.ModuleList):
    """A layer without a packed form: one module per branch."""


class FusedLevel(AnyLevel):
    """One block in several copies with packed weights (`hierens.branches.tensors`); it cannot be trained.

    Attributes:
        block: the block's layers: each has the tensors of all branches, or is an `UnpackedLayer`.
    """

    grouped_weights = FUSED_GROUPED_WEIGHTS

    def __init__(self, block: fx.GraphModule, branches: int, scalars: frozenset[str]) -> None:
        """A level of a packed block.

        Args:
            block: the packed block, which becomes part of the level.
            branches: number of branches in it.
            scalars: names of the tensors that have no dimensions in a single branch.
        """
        super().__init__()
        self.block, self.count, self.scalars = block, branches, scalars
        self.executor, self.fallback_reason, self.plan = "auto", "", {}
        self.size = sum(tensor.numel() for _, tensor in state_of(block)) // branches
        self._pack()

    def _pack(self) -> None:
        looped = {name: f"{type(layer[0]).__name__} has no packed form" for name, layer in unpacked_layers(self.block)}
        self._packed = Packed(_PackedLayers(self), looped) if self.count > 1 else None
        packed = (layer for _, layer in light_layers(self.block) if layer_form(layer))
        self._shared_weights = sum(layer.weight.numel() for layer in packed)

    @property
    def branches(self) -> int:
        """Number of branches."""
        return self.count

    def _grouping_is_faster(self, x: Tensor, branches: int) -> bool:
        """As for every level; with shared weights on a GPU, or if the inputs are fewer than these weights.

        See docs/results/gpu.md and docs/results/light.md.
        """
        if self._shared_weights:
            return x.device.type != "cpu" or x.numel() // branches <= self._shared_weights
        return super()._grouping_is_faster(x, branches)

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
        """Layers that are called once per branch, with the reasons."""
        return self._packed.looped if self._packed else {}

    def first_branches(self, branches: int) -> FusedLevel:
        """See `AnyLevel.first_branches`."""
        return self.part(0, branches)

    @torch.no_grad()
    def part(self, start: int, stop: int) -> FusedLevel:
        """A level with the weights of branches `start` to `stop` only, and the same executor."""
        block, width = copy.deepcopy(self.block), BranchSlice(stop - start, self.count, start)
        for name, tensor in packed_state(block):
            replace(block, name, width.rows(tensor).clone(memory_format=torch.preserve_format))
        for name, module in unpacked_layers(block):
            own = width.chosen(list(module))
            block.set_submodule(name, own[0] if len(own) == 1 else UnpackedLayer(own))
        level = FusedLevel(block, stop - start, self.scalars)
        level.executor = self.executor
        return level

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is derived from the block."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class _PackedLayers:
    """The layers of a packed block, as `hierens.branches.tensors.Layers`."""

    def __init__(self, level: FusedLevel) -> None:
        self.block: nn.Module = level.block
        self.scalars = level.scalars
        self._own = {name for name, _ in packed_state(level.block)}

    def layer(self, name: str) -> PackedLayer:
        """A layer with the tensors of all branches."""
        prefix = f"{name}." if name else ""
        own = frozenset(n.removeprefix(prefix) for n in self.scalars if n.startswith(prefix))
        return PackedLayer(self.block.get_submodule(name), own)

    def modules(self, name: str) -> list[nn.Module]:
        """The module of each branch."""
        module = self.block.get_submodule(name)
        assert isinstance(module, UnpackedLayer)
        return list(module)

    def per_branch(self, name: str) -> bool:
        """Whether each branch has its own value of a tensor."""
        return name in self._own


def unpacked_layers(block: nn.Module) -> list[tuple[str, UnpackedLayer]]:
    """The layers of a block without a packed form, by name."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, UnpackedLayer)]


def packed_state(block: nn.Module) -> list[tuple[str, Tensor]]:
    """The packed tensors of a block by name; not those that all branches share."""
    unpacked, shared = tuple(f"{name}." for name, _ in unpacked_layers(block)), shared_names(block)
    return [(n, tensor) for n, tensor in state_of(block) if not n.startswith(unpacked) and n not in shared]
