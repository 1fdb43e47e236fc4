"""The cost of each depth: parameters, multiply-accumulates and measured latency."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.macs import count_macs
from hierens.core.modes import evaluating


@dataclass(frozen=True)
class DepthCost:
    """The cost of one depth.

    Attributes:
        depth: as in `model(x, depth=...)`.
        leaves: number of networks (or exits) evaluated.
        parameters: number of weights of the sub-tree.
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
    """The cost of every depth on one device; prints as a table."""

    rows: tuple[DepthCost, ...]
    size: tuple[int, ...]
    batch_size: int
    device: str
    unit: str = "networks"

    def __str__(self) -> str:
        """A plain table, one line per depth."""
        return table(*self.cells())

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        rows: list[tuple[str, ...]] = [
            (f"{r.depth}", f"{r.leaves}", millions(r.macs), millions(r.parameters), f"{r.latency_ms:.2f}")
            for r in self.rows
        ]
        return ("depth", self.unit, "MACs", "parameters", "latency (ms)"), rows

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        return dataclasses.asdict(self)


def profile(model: AdaptiveBase, size: tuple[int, ...], batch_size: int = 1) -> Profile:
    """Measure a model at every depth, in evaluation mode and on its device.

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


def summary(model: AdaptiveBase) -> str:
    """A table of every depth's leaves, MACs for an image of the model's size, and parameters.

    MACs are counted on a copy without values; if this fails, they are "unknown".
    """
    try:
        macs = [millions(count) for count in model.macs()]
    except Exception:  # modules raise all kinds of errors
        macs = ["unknown"] * model.depths
    parameters = map(millions, model.parameter_counts())
    size = "x".join(map(str, model.pretrained_cfg["input_size"]))
    rows = [(f"{b}", f"{n}", *counts) for b, (n, *counts) in enumerate(zip(model.sizes, macs, parameters, strict=True))]
    return table(("depth", model.unit, f"MACs ({size})", "parameters"), rows)


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, depth: int, seconds: float = 0.2) -> float:
    """Median milliseconds of a forward pass at a depth, measured for at least `seconds`."""
    return median_ms(partial(model, x, depth=depth), x.device, seconds)


def median_ms(call: Callable[[], Any], device: torch.device, seconds: float = 0.2) -> float:
    """Median milliseconds of a call that computes on a device, measured for at least `seconds`."""
    call_ms(call, device, 0.0), call_ms(call, device, 0.0)  # warm-up: the first calls create kernels and caches
    start = time.perf_counter()
    times: list[float] = []
    while not times or time.perf_counter() - start < seconds:
        times.append(call_ms(call, device, seconds / 20))  # several short passes per reading of the clock
    return statistics.median(times)


def call_ms(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Milliseconds of one call, or the mean of repeated calls if one takes less than `seconds`.

    Args:
        call: the function to time.
        device: the device on which it computes, which is synchronised before and after.
        seconds: total time of repeated calls.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def elapsed(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return time.perf_counter() - start

    # A GPU queues calls much faster than it runs them: calling until the time is up would queue thousands.
    first = elapsed(1)
    if first >= seconds:
        return first * 1e3
    calls = math.ceil(seconds / first)
    return elapsed(calls) / calls * 1e3


def branch_macs(levels: Sequence[Any], size: Sequence[int]) -> tuple[int, ...]:
    """Multiply-accumulates of one branch of each level, for one image.

    Args:
        levels: the levels of a tree in order, such as `hierens.branches.level.Level`.
        size: (C, H, W) of the image.
    """

    def one_branch_each(copies: Sequence[Any], value: Any) -> Iterator[Any]:
        for level in copies:
            value = level.run_branch(0, value)
            yield

    return count_macs(nn.ModuleList(levels), size, one_branch_each)


def millions(count: float) -> str:
    """A count in millions, such as 5.67 M.

    Examples:
        >>> millions(5_670_000), millions(1234)
        ('5.67 M', '0.00 M')
    """
    return f"{count / 1e6:.2f} M"


def is_text(cells: Sequence[str]) -> bool:
    """Whether most cells of a column, the empty ones left out, contain a word or no digit."""
    filled = [cell for cell in cells if cell.strip()]
    words = sum(bool(re.search("[A-Za-z]{3}", cell) or not re.search(r"\d", cell)) for cell in filled)
    return 2 * words > len(filled)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table which is also readable in a terminal: numbers are right-aligned, text is left-aligned.

    Examples:
        >>> print(table(["name", "ms"], [["a tree", "1.25"], ["a network", "10.00"]]))
        | name      |    ms |
        | --------- | ----: |
        | a tree    |  1.25 |
        | a network | 10.00 |
    """
    lines = []
    for column in zip(header, *rows, strict=True):
        width, text = max(3, *map(len, column)), is_text(column[1:])
        rule = "-" * width if text else "-" * (width - 1) + ":"
        head, *cells = (cell.ljust(width) if text else cell.rjust(width) for cell in column)
        lines.append((head, rule, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*lines, strict=True))
