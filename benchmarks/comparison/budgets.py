"""Budgeted batch classification: the curves of the records, and the time saved when images really leave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comparison.differences import Point, difference
from comparison.recipes import RECIPES, ROWS, configured
from comparison.records import RECORDS, machine, write_json
from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group
from hierens.inference.calibration import budgeted_batch, collect, exits
from hierens.training.run import create_ensemble

COSTS = (2, 4, 6, 8, 10, 15, 20, 30)  # million MACs per image
MEASURED = ("exits", "exits-wide", "tree-distilled", "tree-with-exits")
SHARES = (0.1, 0.3, 0.5)  # budgets, from the cost of the first depth (0) to full cost (1)
BATCHES = (1, 256)
IMAGES = 256
_ROUNDS = 3


def curve(group: Group) -> list[Point]:
    """Mean over seeds of mean MACs and accuracy, from the first depth over the thresholds to the last depth."""
    macs, accuracy = np.mean([_budgeted(record) for record in group.records], 0)
    return [Point(group.name, "per image", m / 1e6, a) for m, a in zip(macs, accuracy, strict=True)]


def at_equal_cost(groups: Mapping[str, Group]) -> str:
    """A table of accuracy at some mean costs, with the difference from fixed depths of the same cost."""
    rows = []
    for group in groups.values():
        reached = [cost for cost in COSTS if group.macs[0] <= 1e6 * cost <= group.macs[-1]]
        macs = [1e6 * cost for cost in reached]
        ways = (_budgeted, lambda record: (record["macs"], record["accuracy"]))
        adaptive, fixed = (
            Group("", macs, [{"seed": r["seed"], "accuracy": np.interp(macs, *way(r))} for r in group.records])
            for way in ways
        )
        found = zip(adaptive.mean("accuracy"), difference(adaptive, fixed), strict=True)
        cells = dict(zip(reached, (f"{accuracy:.2f} ({gain})" for accuracy, gain in found), strict=True))
        rows.append((group.name, *(cells.get(cost, "") for cost in COSTS)))
    return table(("million MACs per image", *map(str, COSTS)), rows)


def _budgeted(record: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean MACs and accuracy of a record; at the ends, all images leave at the first or the last depth."""
    macs, accuracy = ([record[f][0], *record["thresholds"][f], record[f][-1]] for f in ("macs", "accuracy"))
    return macs, accuracy


# --- images that really leave -----------------------------------------------------------------------------------------


def measure(data: str) -> Path:
    """Measure the processor time that `Confidence` saves on one thread, with random weights and noise.

    Returns:
        The file of the results.
    """
    torch.set_num_threads(1)
    rows = {}
    for row in MEASURED:
        torch.manual_seed(0)
        model = create_ensemble(configured(data, row, 0, "", ""), 100 if data == "cifar100" else 10).eval()
        rows[row] = _measured(model, RECIPES[data].data.input_size)
    return write_json(_file(data), {"images": IMAGES, "rounds": _ROUNDS, "rows": rows, "machine": machine()})


@torch.no_grad()
def _measured(model: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Shares of the full cost that are saved, and how many images leave at another depth than in a simulation."""
    held_out, images = (torch.randn(IMAGES, *size) for _ in range(2))
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    policies = budgeted_batch(collect(model, [(held_out, labels)]), SHARES)
    answers = collect(model, [(images, labels)])
    sizes = torch.tensor(model.sizes)
    found: dict[str, Any] = {"macs": [], "other_depth": 0, "time": {}}
    for policy in policies:
        simulated = sizes[exits(answers.certainties(policy.measure), policy.thresholds)]
        for batch in BATCHES:
            parts = [policy(model, part) for part in images.split(batch)]
            found["other_depth"] += int((torch.cat([part.leaves for part in parts]) != simulated).sum())
        found["macs"].append(1 - float(torch.cat([part.macs for part in parts]).double().mean()) / answers.macs[-1])
    for batch in BATCHES:
        parts, rounds = images.split(batch), []
        for _ in range(_ROUNDS):
            full_depth = _seconds(model, parts)
            rounds.append([1 - _seconds(partial(policy, model), parts) / full_depth for policy in policies])
        found["time"][f"{batch}"] = [median(of) for of in zip(*rounds, strict=True)]
    return found


def _seconds(call: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> float:
    """Processor time, which other processes on the machine change less than the time that passes."""
    start = time.process_time()
    for batch in batches:
        call(batch)
    return time.process_time() - start


def saved(data: str) -> str:
    """A table of saved MACs and saved time, and a sentence on the difference from the simulation."""
    if not _file(data).is_file():
        return "Not measured yet."
    found = json.loads(_file(data).read_text())
    rows = []
    for row, of in found["rows"].items():
        for batch in BATCHES:
            pairs = list(zip(of["macs"], of["time"][f"{batch}"], strict=True))
            cells = (f"{100 * macs:.0f} / {100 * seconds:.0f}" for macs, seconds in pairs)
            rows.append((ROWS[row].title, f"{batch}", *cells, f"{mean(s / m for m, s in pairs):.2f}"))
    runs = found["images"] * len(found["rows"]) * len(SHARES) * len(BATCHES)
    other = sum(of["other_depth"] for of in found["rows"].values())
    on = ", ".join(found["machine"][key] for key in ("processor", "instructions"))
    header = ("saved MACs / saved time (%)", "batch", *(f"budget {100 * s:.0f} %" for s in SHARES), "time per MACs")
    return f"""{table(header, rows)}

Of {runs:,} predictions, {other:,} left at another depth than the simulation says. Times are processor times of one
thread ({on}), medians of {found["rounds"]} rounds. {found.get("note", "")}"""


def _file(data: str) -> Path:
    return RECORDS / data / "early_exit.json"
