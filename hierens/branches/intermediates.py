"""Values inside blocks, such as the ends of a backbone's stages, read in a call of a level or a block.

The graphs of the blocks get more outputs. Their modules are the branches' own, so hooks, replaced modules and changed
weights have their usual effect, and each executor works as without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.level import Level
from hierens.core.block_values import Value
from hierens.cutting.block import Block

Nodes = Mapping[int, tuple[str, ...]]  # names of nodes in the graph of a level's block, by the level's index

_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Any]] = WeakKeyDictionary()


class TappedLevel(Level):
    """A level's branches, whose outputs end with the values of some nodes; the level still owns the branches."""

    def __init__(self, level: Level, nodes: tuple[str, ...]) -> None:
        nn.ModuleList.__init__(self, (tapped_block(branch, nodes) for branch in level))
        self.nodes, self.returns_one = nodes, bool(level[0].returns_one)
        self.size, self.known, self._forms, self._flat = level.size, level.known, [], level._flat
        self.origins = list(level)

    def forward(self, x: Activations, parents: Sequence[int] | None = None) -> Activations:
        """The level's outputs, with the values of the nodes as `taps`."""
        found = super().forward(x, parents)
        if found.packed is not None:
            outputs, taps = parted(found.packed, len(self.nodes), self.returns_one)
            return Activations(packed=outputs, count=found.count, taps=[tap.chunk(found.count, 1) for tap in taps])
        parts = [parted(value, len(self.nodes), self.returns_one) for value in found.values]
        return Activations([own for own, _ in parts], taps=list(zip(*(taps for _, taps in parts), strict=True)))


def unmerged(level: nn.Module) -> Level:
    """A level, if it is one of ordinary branches.

    Raises:
        ValueError: it is a fused one.
    """
    if not isinstance(level, Level):
        raise ValueError("layers of a fused model are merged: get feature maps from the model before fuse().")
    return level


def tapped(level: nn.Module, nodes: tuple[str, ...]) -> TappedLevel:
    """A level whose outputs have the values of these nodes as `taps`.

    Raises:
        ValueError: the blocks have no such nodes, or the level is a fused one.
    """
    level = unmerged(level)
    known = _KNOWN.setdefault(level, {})
    found: TappedLevel | None = known.get(nodes)
    if found is None or found.origins != list(level) or found._flat is not level._flat:
        found = known[nodes] = TappedLevel(level, nodes)
    found.executor, found.fallback_reason, found.plan = level.executor, level.fallback_reason, level.plan
    return found


def tapped_block(block: nn.Module, nodes: tuple[str, ...]) -> Block:
    """A block that returns the values of these nodes after its outputs: see `tapped`."""
    if not isinstance(block, Block):
        raise ValueError(f"feature maps inside a {type(block).__name__} cannot be read: convert the backbone again.")
    known = _KNOWN.setdefault(block, {})
    if (found := known.get(nodes)) is None:
        found = known[nodes] = block.tapped(nodes)
    return found


def run_block(
    run: Callable[[nn.Module, Value], Value], block: nn.Module, value: Value, nodes: tuple[str, ...]
) -> tuple[Value, tuple[Tensor, ...]]:
    """The output of a block, called as `run(block, value)`, and the values of these nodes."""
    if not nodes:
        return run(block, value), ()
    own = tapped_block(block, nodes)
    assert isinstance(block, Block)
    return parted(run(own, value), len(nodes), block.returns_one)


def parted(value: tuple[Any, ...], taps: int, returns_one: bool) -> tuple[Value, tuple[Tensor, ...]]:
    """The output of a block, which may be one value, and the values of so many nodes."""
    outputs = value[: len(value) - taps]
    return outputs[0] if returns_one else outputs, value[len(outputs) :]
