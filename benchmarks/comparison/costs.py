"""Accuracy of rows against their costs in MACs, milliseconds and megabytes."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comparison.differences import Point
from comparison.recipes import BASE_WIDTH, RECIPES, ROWS, configured
from comparison.records import DEEP_ENSEMBLE, RECORDS, machine
from hierens.evaluation.profiling import latency
from hierens.evaluation.reporting import Group
from hierens.training.run import create_ensemble

UNITS = {
    "macs": "million MACs per image",
    "ms": "milliseconds for one image",
    "mb": "megabytes of weights that the depth reads",
}
_ROUNDS = 7


def points(groups: Mapping[str, Group], unit: str, times: Mapping[str, Sequence[float]]) -> dict[str, list[Point]]:
    """Accuracy against cost at each depth of every row.

    Args:
        groups: the records.
        unit: a key of `UNITS`.
        times: measured milliseconds per row and depth.
    """
    found = {}
    for row, group in groups.items():
        costs = {
            "macs": [macs / 1e6 for macs in group.macs],
            "mb": [count * 4 / 1e6 for count in group.records[0]["parameters"]],
            "ms": list(times.get(row, ())),
        }[unit]
        sizes = [f"{depth}" if len(costs) > 1 else "" for depth in range(len(costs))]
        found[row] = [
            Point(group.name, depth, cost, accuracy)
            for depth, cost, accuracy in zip(sizes, costs, group.mean("accuracy"), strict=False)
        ]
    return found


def threshold_points(group: Group) -> list[Point]:
    """Points of mean MACs and accuracy with calibrated thresholds."""
    macs, accuracy = (
        [statistics.mean(values) for values in zip(*(r["thresholds"][field] for r in group.records), strict=True)]
        for field in ("macs", "accuracy")
    )
    return [Point(f"{group.name}, thresholds", "per image", m / 1e6, a) for m, a in zip(macs, accuracy, strict=True)]


def read_times(data: str) -> dict[str, Any]:
    """The latencies written by `measure`; empty if there are none."""
    file = _times_file(data)
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def measure(data: str) -> Path:
    """Measure the latency of one image at every depth of every row, on one thread, with untrained weights.

    Returns:
        The file with medians over rounds in milliseconds, and the machine.
    """
    torch.set_num_threads(1)
    models: dict[str, Any] = {}  # by configuration, because many rows differ in their training only
    of_row: dict[str, str] = {}
    for row, entry in ROWS.items():
        run = configured(data, row, 0, "", "")
        if entry.start:  # its model is a changed copy of a trained one
            run = dataclasses.replace(run, model=dataclasses.replace(run.model, start="", new_classifiers=False))
        of_row[row] = name = repr(run.model)
        if name not in models:
            models[name] = create_ensemble(run, 100 if data == "cifar100" else 10).eval()
    image = torch.randn(1, *RECIPES[data].data.input_size)
    rounds = [
        {name: [latency(model, image, depth, 0.1) for depth in range(model.depths)] for name, model in models.items()}
        for _ in range(_ROUNDS)
    ]
    middle = {name: [statistics.median(of) for of in zip(*(r[name] for r in rounds), strict=True)] for name in models}
    times = {row: middle[name] for row, name in of_row.items()}
    times[DEEP_ENSEMBLE] = [size * times[f"single-{BASE_WIDTH}"][0] for size in (1, 2, 4, 8)]
    file = _times_file(data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"milliseconds": times, "machine": machine()}, indent=1) + "\n")
    return file


def _times_file(data: str) -> Path:
    return RECORDS / data / "latency.json"
