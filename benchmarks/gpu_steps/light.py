"""The step `light`: the time of trees whose members share weights, compared with full trees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from light_speed import NETWORKS, WAYS, models
from speed import rounds

from gpu_steps.records import Context, Record, measure
from gpu_steps.speed_table import quartiles

TINY = {"test_vit": ({"img_size": 32, "num_classes": 7}, 32)}


def light(context: Context, batch_sizes: Sequence[int], seconds: float) -> int:
    """Time every depth of light and full trees in bfloat16; write light.json.

    Args:
        context: folders and time limit.
        batch_sizes: images per call.
        seconds: duration of the rounds of one cell.

    Returns:
        The number of cells that remain.
    """
    cases = (
        (f"{name}, batch {batch}, depth {depth}", 20, partial(_cell, context, name, batch, depth, seconds))
        for name in (TINY if context.tiny else NETWORKS)
        for batch in batch_sizes
        for depth in (1, 2, 3)
    )
    return measure(Record(context, "light", go_on=True), cases)


@lru_cache(maxsize=1)
def _models(name: str, device: torch.device) -> dict[str, Any]:
    arguments, _ = {**NETWORKS, **TINY}[name]
    return {way: model.to(device, torch.bfloat16) for way, model in models(name, arguments).items()}


@torch.no_grad()
def _cell(context: Context, name: str, batch: int, depth: int, seconds: float) -> dict[str, Any]:
    made, (_, pixels) = _models(name, context.device), {**NETWORKS, **TINY}[name]
    x = torch.randn(batch, 3, pixels, pixels, device=context.device, dtype=torch.bfloat16)
    times = rounds({way: partial(made[way], x, depth=depth) for way in WAYS}, seconds)
    return {
        "network": name,
        "pixels": pixels,
        "precision": "bf16",
        "batch": batch,
        "depth": depth,
        "ms": {way: quartiles(found) for way, found in times.items()},
    }
