"""The step `switching`: the cost of changing the depth between calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_steps.cuda_graphs import captured
from gpu_steps.networks import NETWORKS, TINY
from gpu_steps.records import Context, Record, measure
from gpu_steps.speed_table import Call, prepared, quartiles

SWITCHED = {False: ("hne_resnet50_cifar_small", "resnet18"), True: ("tiny_resnet",)}
EAGER, GRAPHS, COMPILED, REDUCED = "eager", "CUDA graphs", "torch.compile", "torch.compile, reduce-overhead"


def switching(context: Context, batch_sizes: Sequence[int], seconds: float) -> int:
    """Time calls at a constant depth and calls that alternate between depths; write switching.json.

    Args:
        context: folders and time limit.
        batch_sizes: images per call.
        seconds: duration of the rounds of one cell.

    Returns:
        The number of cells that remain.
    """
    cases = (
        (
            f"{name}, {form}, {way}, batch {batch}",
            150 if way in (COMPILED, REDUCED) else 45,
            partial(_switched_cell, context, name, form, way, batch, seconds),
        )
        for way in (EAGER, GRAPHS, COMPILED, REDUCED)  # the slowest to prepare come last
        for name in SWITCHED[context.tiny]
        for form in (("tree", "fused") if way == EAGER else ("fused",))
        for batch in batch_sizes
    )
    return measure(Record(context, "switching", go_on=True), cases)


@torch.no_grad()
def _switched_cell(context: Context, name: str, form: str, way: str, batch: int, seconds: float) -> dict[str, Any]:
    about = {"network": name, "form": form, "way": way, "batch": batch, "precision": "bf16"}
    if context.device.type == "cpu" and way in (GRAPHS, REDUCED):
        return {**about, "failed": "CUDA graphs need a GPU"}
    models = prepared(name, torch.bfloat16, context.device, ())
    model = models.tree if form == "tree" else models.fused
    x = torch.randn(batch, *{**NETWORKS, **TINY}[name].size, device=context.device, dtype=torch.bfloat16)
    depths = (0, model.depths - 1)
    expected = {depth: model(x, depth=depth).clone() for depth in depths}
    calls, first = {}, {}
    try:
        run = _runner(model, x, way, context.tiny)
        for depth in depths:
            start = time.perf_counter()
            calls[depth] = run(depth)
            answer = calls[depth]().clone()
            _wait(context.device)
            first[depth] = (time.perf_counter() - start) * 1e3
            if not torch.allclose(answer, expected[depth], rtol=0.1, atol=0.05 * float(expected[depth].abs().max())):
                raise ValueError(f"{way} gives other outputs than eager mode at depth {depth}")
        times = _in_turns(calls, depths, context.device, seconds)
    finally:
        torch.compiler.reset()
    same = statistics.median(times["first"]) / 2 + statistics.median(times["last"]) / 2
    return {
        **about,
        "depths": list(depths),
        "first_call_ms": [first[depth] for depth in depths],
        "same_ms": [quartiles(times["first"]), quartiles(times["last"])],
        "alternating_ms": quartiles(times["alternating"]),
        "overhead_ms": statistics.median(times["alternating"]) - same,
    }


def _runner(model: Any, x: Tensor, way: str, tiny: bool) -> Callable[[int], Call]:
    """A function that returns a call for a depth."""
    if way == EAGER:
        return lambda depth: lambda: model(x, depth=depth)
    if way == GRAPHS:
        return lambda depth: _captured(model, x, depth)
    options: dict[str, Any] = {"backend": "eager"} if tiny else {"mode": "reduce-overhead" if way == REDUCED else None}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **options)

    def call(depth: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # allows the next graph to reuse memory
        return compiled(x, depth=depth)

    return lambda depth: lambda: call(depth)


def _captured(model: Any, x: Tensor, depth: int) -> Call:
    """A depth as a CUDA graph, which reads its images from a fixed buffer."""
    images = x.clone()
    replay = captured(lambda: model(images, depth=depth), x.device)

    def call() -> Tensor:
        images.copy_(x)
        return replay()

    return call


def _in_turns(
    calls: dict[int, Call], depths: tuple[int, int], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds per synchronised call at the first depth, at the last, and alternating, in rounds."""
    orders = {"first": (depths[0],) * 2, "last": (depths[1],) * 2, "alternating": depths}
    times: dict[str, list[float]] = {name: [] for name in orders}
    start = time.perf_counter()
    while len(times["first"]) < 5 or time.perf_counter() - start < seconds:
        for name, order in orders.items():
            begin = time.perf_counter()
            for _ in range(10):
                for depth in order:
                    calls[depth]()
                    _wait(device)
            times[name].append((time.perf_counter() - begin) / 20 * 1e3)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
