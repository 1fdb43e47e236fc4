"""What each depth costs: parameters, multiply-accumulates and measured latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from hierens.modes import evaluating, frozen
from hierens.tree import Tree, nested_sizes


class Profiled(Protocol):
    """What a model must offer to be profiled: nested predictions chosen by `depth`, and its own arithmetic of cost."""

    tree: Tree

    def macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Multiply-accumulates per depth."""

    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters per depth."""

    def __call__(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Logits at a depth."""


@dataclass(frozen=True)
class DepthCost:
    """The cost of one depth.

    Attributes:
        depth: as in `model(x, depth=...)`.
        leaves: networks evaluated.
        parameters: weights that the sub-tree reads.
        macs: multiply-accumulates per image.
        latency_ms: median time of a forward pass over the batch, in milliseconds.
    """

    depth: int
    leaves: int
    parameters: int
    macs: int
    latency_ms: float


@dataclass(frozen=True)
class Profile:
    """The cost of every depth on one device; printed, it is a table."""

    rows: tuple[DepthCost, ...]
    size: tuple[int, ...]
    batch_size: int
    device: str

    def __str__(self) -> str:
        """A plain table, one line per depth."""
        rows = [
            (f"{r.depth}", f"{r.leaves}", millions(r.macs), millions(r.parameters), f"{r.latency_ms:.2f}")
            for r in self.rows
        ]
        return table(("depth", "networks", "MACs", "parameters", "latency (ms)"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self)


def profile(model: Profiled, size: tuple[int, ...], batch_size: int = 1) -> Profile:
    """Measure a model at every depth, in evaluation mode, on the device where it lies.

    Args:
        model: a hierarchical ensemble.
        size: (C, H, W) of the images.
        batch_size: images per forward pass.
    """
    assert isinstance(model, nn.Module)
    parameter = next(model.parameters())
    x = torch.randn(batch_size, *size, device=parameter.device, dtype=parameter.dtype)
    costs = zip(nested_sizes(model.tree.leaves), model.parameter_counts(), model.macs(size), strict=True)
    with evaluating(model):
        rows = tuple(
            DepthCost(depth, leaves, parameters, macs, latency(model, x, depth))
            for depth, (leaves, parameters, macs) in enumerate(costs)
        )
    return Profile(rows, tuple(size), batch_size, str(parameter.device))


@torch.no_grad()
def latency(model: Profiled, x: Tensor, depth: int, seconds: float = 0.2) -> float:
    """Median milliseconds of a forward pass at a depth, measured for at least `seconds`."""
    timer = benchmark.Timer(
        "model(x, depth=depth)", globals={"model": model, "x": x, "depth": depth}, num_threads=torch.get_num_threads()
    )
    return float(timer.blocked_autorange(min_run_time=seconds).median) * 1e3


@torch.no_grad()
def branch_macs(levels: Sequence[Any], size: Sequence[int]) -> list[int]:
    """Multiply-accumulates of one branch of each level, for one image, counted while it runs.

    Args:
        levels: the levels of a tree in order, as `hierens.branching.Level`.
        size: (C, H, W) of the image.
    """
    parameter = next(p for level in levels for p in level.parameters())
    value: Any = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    counted = []
    for level in levels:
        with evaluating(level), frozen(level), FlopCounterMode(display=False) as counter:
            value = level.run_branch(0, value)
        counted.append(int(counter.get_total_flops()) // 2)
    return counted


def millions(count: float) -> str:
    """A count as people write it: 5.67 M.

    Examples:
        >>> millions(5_670_000), millions(1234)
        ('5.67 M', '0.00 M')
    """
    return f"{count / 1e6:.2f} M"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns in Markdown's form, so that a terminal and a page both show a table.

    Examples:
        >>> print(table(["a", "long"], [["1", "2"]]))
        |   a | long |
        | --: | ---: |
        |   1 |    2 |
    """
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    lines = [[cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in (header, *rows)]
    lines.insert(1, ["-" * (w - 1) + ":" for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
