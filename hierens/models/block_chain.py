"""`BlockChain`: blocks that run one after another, with places for exits; the base class of `MultiExit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.intermediates import Nodes, run_block
from hierens.models.pruning import WeightedExits


class BlockChain(WeightedExits):
    """A chain of blocks.

    Attributes:
        levels: the blocks, in order.
        positions: the index of the block after which each exit is placed.
    """

    positions: tuple[int, ...]

    def _blocks_before(self, index: int) -> nn.ModuleList:
        """The blocks between the previous exit and this one."""
        start = self.positions[index - 1] + 1 if index else 0
        return self.levels[start : self.positions[index] + 1]

    def _run_block(self, level: nn.Module, value: Any) -> Any:
        return self._run(level, *value) if isinstance(value, tuple) else self._run(level, value)

    def forward_features(self, x: Tensor, depth: int | None = None) -> Any:
        """The output of the blocks up to an exit; for the last exit, the default, the backbone's `forward_features`."""
        value: Any = self._prepared(x)
        for level in self.levels[: self._levels_run(self.leaves_at(depth))]:
            value = self._run_block(level, value)
        return value

    def _levels_run(self, leaves: int) -> int:
        return self.positions[leaves - 1] + 1

    def _forward_stages(self, x: Tensor, leaves: int, nodes: Nodes) -> Iterator[tuple[Activations, list[int]]]:
        value: Any = x
        for index, level in enumerate(self.levels):
            value, taps = run_block(self._run_block, level, value, nodes.get(index, ()))
            yield Activations([value], taps=[[tap] for tap in taps]), [1]

    def _as_features(self, outputs: Activations) -> Any:
        return outputs.values[0]
