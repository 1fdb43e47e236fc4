"""What each depth costs: parameters, multiply-accumulates and measured latency."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hierens.core.adaptive import AdaptiveBase
from hierens.core.macs import count_macs
from hierens.core.modes import evaluating


@dataclass(frozen=True)
class DepthCost:
    """The cost of one depth.

    Attributes:
        depth: as in `model(x, depth=...)`.
        leaves: networks (or exits) evaluated.
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
    unit: str = "networks"

    def __str__(self) -> str:
        """A plain table, one line per depth."""
        return table(*self.cells())

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table's header and rows."""
        rows: list[tuple[str, ...]] = [
            (f"{r.depth}", f"{r.leaves}", millions(r.macs), millions(r.parameters), f"{r.latency_ms:.2f}")
            for r in self.rows
        ]
        return ("depth", self.unit, "MACs", "parameters", "latency (ms)"), rows

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self)


def profile(model: AdaptiveBase, size: tuple[int, ...], batch_size: int = 1) -> Profile:
    """Measure a model at every depth, in evaluation mode, on the device where it lies.

    Args:
        model: a hierarchical ensemble or a multi-exit network.
        size: (C, H, W) of the images.
        batch_size: images per forward pass.
    """
    parameter = next(model.parameters())
    x = torch.randn(batch_size, *size, device=parameter.device, dtype=parameter.dtype)
    costs = zip(model.sizes, model.parameter_counts(), model.macs(size), strict=True)
    with evaluating(model):
        rows = tuple(
            DepthCost(depth, leaves, parameters, macs, latency(model, x, depth))
            for depth, (leaves, parameters, macs) in enumerate(costs)
        )
    return Profile(rows, tuple(size), batch_size, str(parameter.device), model.unit)


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, depth: int, seconds: float = 0.2) -> float:
    """Median milliseconds of a forward pass at a depth, measured for at least `seconds`."""

    def once(at_least: float = 0.0) -> float:
        return call_ms(partial(model, x, depth=depth), x.device, at_least)

    once(), once()  # what is made at the first call is not a pass's own
    began = time.perf_counter()
    taken: list[float] = []
    while not taken or time.perf_counter() - began < seconds:
        taken.append(once(seconds / 20))  # several short passes together, so that the clock does not count
    return statistics.median(taken)


def call_ms(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Milliseconds of a call: of one, or the mean of several that take `seconds` together where one is shorter.

    Args:
        call: what is timed.
        device: where it computes; it is waited for.
        seconds: how long to repeat a short call.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def elapsed(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return time.perf_counter() - start

    # A GPU takes calls much faster than it runs them: calling until the time is up would queue thousands.
    first = elapsed(1)
    if first >= seconds:
        return first * 1e3
    calls = math.ceil(seconds / first)
    return elapsed(calls) / calls * 1e3


def branch_macs(levels: Sequence[Any], size: Sequence[int]) -> tuple[int, ...]:
    """Multiply-accumulates of one branch of each level, for one image.

    Args:
        levels: the levels of a tree in order, as `hierens.branches.level.Level`.
        size: (C, H, W) of the image.
    """

    def one_branch_each(copies: Sequence[Any], value: Any) -> Iterator[Any]:
        for level in copies:
            value = level.run_branch(0, value)
            yield

    return count_macs(nn.ModuleList(levels), size, one_branch_each)


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
