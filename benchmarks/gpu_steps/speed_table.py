"""The step `speed`: the time of every depth with every way to run it, and its minimum on this device."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from speed import rounds
from torch import Tensor

from gpu_steps.networks import DTYPES, NETWORKS, TINY, built, precision
from gpu_steps.records import Context, Record, measure
from gpu_steps.roofline import activation_values, least_ms, peaks

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A network on the device in all forms.

    Attributes:
        tree: the tree.
        fused: `tree.fuse()`.
        tuned: the same, tuned.
        plain, plain_fused: the first network alone.
        tuning: report of `tune()`.
    """

    tree: Any
    fused: Any
    tuned: Any
    plain: Any
    plain_fused: Any
    tuning: str


@lru_cache(maxsize=1)
def prepared(name: str, dtype: torch.dtype, device: torch.device, batch_sizes: tuple[int, ...]) -> Prepared:
    """Create, move, fuse and tune a network. Without batch sizes it is not tuned."""
    size = {**NETWORKS, **TINY}[name].size
    tree = copy.deepcopy(built(name)).to(device)
    fused, plain = tree.fuse(), tree.at_depth(0)
    models = [model.to(dtype) for model in (tree, fused, copy.deepcopy(fused), plain, plain.fuse())]
    tuning = ""
    if batch_sizes:
        images = torch.randn(1, *size, device=device, dtype=dtype)
        tuning = str(models[2].tune(images, batch_sizes=batch_sizes))
    return Prepared(*models, tuning)


def speed(context: Context, precisions: Sequence[str], batch_sizes: Sequence[int], seconds: float) -> int:
    """Time every depth with every way to run it, and write speed.json.

    Args:
        context: folders and time limit.
        precisions: names of `gpu_steps.networks.DTYPES`.
        batch_sizes: images per call.
        seconds: duration of the rounds of one cell.

    Returns:
        The number of cells that remain.
    """
    if unknown := [name for name in precisions if name not in DTYPES]:
        raise ValueError(f"there is no precision {unknown[0]!r}: choose {', '.join(DTYPES)}.")
    record = Record(context, "speed", go_on=True)
    known = record.content.setdefault("peaks", {})
    names = TINY if context.tiny else NETWORKS
    for name in precisions:
        if name not in known:
            with precision(name) as dtype:
                known[name] = peaks(context.device, dtype, context.tiny)
            record.write()
    batches = tuple(batch_sizes)
    cases = (
        (
            f"{name}, {kind}, batch {batch}, depth {depth}",
            45,
            partial(_timed_cell, record, name, kind, batch, depth, batches, seconds),
        )
        for kind in precisions
        for name in names
        for batch in batches
        for depth in range(built(name).depths)
    )
    return measure(record, cases)


@torch.no_grad()
def _timed_cell(
    record: Record, name: str, kind: str, batch: int, depth: int, batches: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    size, device = {**NETWORKS, **TINY}[name].size, record.context.device
    with precision(kind) as dtype:
        models = prepared(name, dtype, device, batches)
        x = torch.randn(batch, *size, device=device, dtype=dtype)
        ways = ways_to_run(models, x, depth)
        off = differences(ways)
        times = rounds(ways, seconds)
    costs = cost(name, depth)
    record.content.setdefault("tuning", {})[f"{name}, {kind}"] = models.tuning
    return {
        "network": name,
        "precision": kind,
        "batch": batch,
        "depth": depth,
        "leaves": models.tree.tree.leaves_at(depth),
        **costs,
        "least_ms": least_ms(**costs, batch=batch, item=dtype.itemsize, peak=record.content["peaks"][kind]),
        "ms": {way: quartiles(found) for way, found in times.items()},
        "difference": off,
    }


def ways_to_run(models: Prepared, x: Tensor, depth: int) -> dict[str, Call]:
    """Calls of the backbone and of the tree, by name."""
    last = x.contiguous(memory_format=torch.channels_last)

    def by(executor: str, images: Tensor) -> Call:
        def call() -> Tensor:
            models.tree.set_executor(executor)
            return models.tree(images, depth=depth)

        return call

    return {
        "backbone": lambda: models.plain(x),
        "backbone, channels last": lambda: models.plain(last),
        "backbone, fused": lambda: models.plain_fused(x),
        "looped": by("looped", x),
        "grouped": by("grouped", x),
        "grouped, channels last": by("grouped", last),
        "auto": by("auto", x),
        "fused": lambda: models.fused(x, depth=depth),
        "fused, tuned": lambda: models.tuned(x, depth=depth),
    }


def differences(ways: dict[str, Call]) -> dict[str, float]:
    """The largest difference of each way's logits from the looped ones, relative to the largest looped logit."""
    expected = ways["looped"]().float()
    largest = float(expected.abs().max())
    others = {name: way for name, way in ways.items() if name != "looped" and not name.startswith("backbone")}
    return {name: float((way().float() - expected).abs().max()) / largest for name, way in others.items()}


@lru_cache(maxsize=64)
def cost(name: str, depth: int) -> dict[str, int]:
    """MACs, weights and activations of a depth, counted on the CPU with the looped executor."""
    model, size = built(name), {**NETWORKS, **TINY}[name].size
    values = _values(name)[depth]
    return {"macs": model.macs(size)[depth], "parameters": model.parameter_counts()[depth], "values": values}


@lru_cache(maxsize=8)
def _values(name: str) -> list[int]:
    return activation_values(built(name), {**NETWORKS, **TINY}[name].size)


def quartiles(times: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return list(times) * 3 if len(times) == 1 else statistics.quantiles(times, n=4, method="inclusive")
