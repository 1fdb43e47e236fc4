"""Measures a stream of images that turn noisy, blurred and dark under a bursty load, with and without the controller.

python benchmarks/drift.py --data-dir DIR   all runs, of 110 s each; writes the record and docs/results/drift.md
python benchmarks/drift.py --no-run         writes the page from the record

DIR contains Fashion-MNIST's idx files. The controller is `LatencyObjective`; the model is models/fashion-mnist-tree.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from comparison.records import ROOT, machine, write_json
from drift_page import page
from drift_stream import EVERY_S, PHASES, Outcome, arrivals, corrupted, serve
from torch.utils.data import DataLoader, Subset

import hierens
from hierens.inference.calibration import CalibrationSet, budgeted_batch, collect
from hierens.inference.expectation import expectation
from hierens.inference.policies import LatencyObjective, Policy
from hierens.training.config import DataConfig
from hierens.training.data.loaders import create_held_out

RECORD, PAGE = (ROOT / "docs" / "results" / name for name in ("runs/drift.json", "drift.md"))
MODEL = ROOT / "models" / "fashion-mnist-tree"
WINDOW_S = 2.0  # of the lines of the figure


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str = ""
    """folder with Fashion-MNIST's idx files"""
    run: bool = True
    """measure, or write the page from the record alone"""
    only: str = ""
    """measure one run of the record again, with the same arrivals: LOAD/POLICY"""
    seconds: float = 22
    """length of each of the five phases"""
    target_ms: float = 150
    """of the 99th percentile of latencies"""
    agreement: float = 0.98
    """bound of the share of images whose class is that of all networks"""
    batch: int = 16
    """largest batch without the controller"""
    loads: tuple[float, float] = (0.7, 1.4)
    """arrivals between bursts, in shares of the rate that full depth can answer"""


class Bench:
    """The model, the images and the policies.

    Attributes:
        capacity: images per second at full depth, in the best batch size; measured unless it is given.
    """

    def __init__(self, settings: Settings, capacity: float | None) -> None:
        self.settings = settings
        self.model = hierens.from_pretrained(MODEL).eval().fuse()
        size, mean, std = (self.model.pretrained_cfg[name] for name in ("input_size", "mean", "std"))
        config = DataConfig("fashion_mnist", settings.data_dir, input_size=size, mean=mean, std=std)
        data = create_held_out(config)
        clean, mean, std = torch.stack([data[index][0] for index in range(5000, 7500)]), mean[0], std[0]
        self.images = {phase: (corrupted(clean * std + mean, phase) - mean) / std for phase in PHASES[:4]}
        self.images[PHASES[4]] = self.images[PHASES[0]]
        self.held_out = collect(self.model, DataLoader(Subset(data, range(2500)), 500))
        labels = torch.zeros(500, dtype=torch.long)
        self.full = {
            phase: collect(self.model, [(part, labels) for part in those.split(500)]).logits[:, -1].argmax(1).numpy()
            for phase, those in self.images.items()
        }
        times = self.controller()._planner.times_ms
        self.capacity = capacity or 1e3 * max(2**k / row[-1] for k, row in enumerate(times))

    def controller(self) -> LatencyObjective:
        """A controller that has measured the times of the model."""
        made = LatencyObjective.from_calibration(self.held_out, self.settings.target_ms, self.settings.agreement)
        made.learn(self.model, self.images["clean"][:32])
        return made

    def policies(self) -> dict[str, Policy]:
        """The controller, and thresholds fitted once: the cheapest that hold the bound, and cautious ones."""
        shares = [step / 100 for step in range(1, 51)]
        fixed = budgeted_batch(self.held_out, shares)
        cheapest = next(one for one in fixed if agreement(self.held_out, one) >= self.settings.agreement + 0.005)
        cautious = next(one for one in fixed if agreement(self.held_out, one) >= 0.9995)
        return {"cheap": cheapest, "cautious": cautious, "controller": self.controller()}

    def measure(self, load: float, policy: Policy) -> dict[str, Any]:
        """One run."""
        seconds = self.settings.seconds
        due = arrivals(load * self.capacity, seconds * len(PHASES))
        phases = [PHASES[min(int(at // seconds), len(PHASES) - 1)] for at in due]
        which = np.random.default_rng(1).integers(0, 2500, len(due))
        images = [self.images[phase][index] for phase, index in zip(phases, which, strict=True)]
        wanted = np.array([self.full[phase][index] for phase, index in zip(phases, which, strict=True)])
        with torch.inference_mode():
            found = serve(self.model, policy, self.settings.batch, due, images)
        return summary(found, found.predicted == wanted, self.model.macs()[-1], self.settings)


def agreement(predictions: CalibrationSet, policy: Any) -> float:
    """The share of images that leave with the class of all networks."""
    exact = dataclasses.replace(predictions, labels=predictions.logits[:, -1].argmax(1))
    return expectation(exact, policy).accuracy.mean / 100


def summary(found: Outcome, agreed: np.ndarray, macs: int, settings: Settings) -> dict[str, Any]:
    """The part of the record about a run: phases, lines of the figure, and what was lost."""
    seconds = settings.seconds

    def part(start: float, end: float) -> dict[str, Any]:
        rows = (found.due >= start) & (found.due < end)
        latencies = found.latency_ms[rows]
        return {
            "images": int(rows.sum()),
            "agreement": float(agreed[rows].mean()),
            "p50": float(np.percentile(latencies, 50)),
            "p99": float(np.percentile(latencies, 99)),
            "late": float((latencies > settings.target_ms).mean()),
            "macs": float(found.macs[rows].mean() / macs),
        }

    phases = [part(k * seconds, (k + 1) * seconds) for k in range(len(PHASES))]
    for k, phase in enumerate(phases):
        windows = np.arange(0, seconds - EVERY_S + 0.01, 0.5)
        broken = [at for at in windows if not holds(part(k * seconds + at, k * seconds + at + EVERY_S), settings)]
        phase["delay"] = next((float(at) for at in windows if not broken or at > broken[-1]), None)
    lines = [part(at, at + WINDOW_S) for at in np.arange(0, seconds * len(PHASES) - WINDOW_S / 2, WINDOW_S)]
    return {
        "rate": len(found.due) / seconds / len(PHASES),
        "lost": int((found.answers == 0).sum()),
        "twice": int((found.answers > 1).sum()),
        "phases": phases,
        "lines": lines,
        "shadow": found.shadow_s / seconds / len(PHASES),
        "states": found.states[:: max(1, round(WINDOW_S))],
    }


def holds(part: dict[str, Any], settings: Settings) -> bool:
    """Whether both bounds hold."""
    return part["agreement"] >= settings.agreement and part["p99"] <= settings.target_ms


def main(settings: Settings) -> None:
    """Measure, write the record after each run, and write the page."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if settings.run:
        torch.set_num_threads(1)
        record = json.loads(RECORD.read_text()) if settings.only and RECORD.is_file() else {"runs": {}}
        bench = Bench(settings, record.get("capacity"))
        names = ("target_ms", "agreement", "seconds", "batch", "loads")
        record |= {
            "machine": machine(),
            "capacity": bench.capacity,
            **{name: getattr(settings, name) for name in names},
        }
        for load in settings.loads:
            for name, policy in bench.policies().items():
                key = f"{load:g}/{name}"
                if settings.only in ("", key):
                    print(f"{key}: capacity {bench.capacity:.0f} images per second", flush=True)
                    run = bench.measure(load, policy)
                    run["thresholds"] = list(getattr(policy, "thresholds", ()))
                    record["runs"][key] = run
                    write_json(RECORD, record)
    PAGE.write_text(page(json.loads(RECORD.read_text()), PAGE.parent))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
