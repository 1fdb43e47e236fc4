"""Compares time and memory of two checkouts of hierens; writes docs/results/commits.md.

python benchmarks/commits.py OLD_CHECKOUT                       # about half an hour on two cores
python benchmarks/commits.py OLD_CHECKOUT --networks resnet18 --ways unfused

Each checkout runs in its own process. The two alternate within every round, so that disturbances affect both. A cell is
the median over rounds of the ratio new / old of each round. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import tyro
from commit_worker import SMALL
from comparison.records import machine, write_json

from hierens.evaluation.profiling import table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "runs" / "commits.json"
WORKER = Path(__file__).with_name("commit_worker.py")
PAGE = ROOT / "docs" / "results" / "commits.md"
NETWORKS = ("hne_mobilenetv2_075", "resnet18", "resnet50", "efficientnet_b0")
WAYS = ("fused", "unfused", "training")
TRAINING_BATCH, MAX_ROUNDS, STEPS = 8, 41, 20


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    old: tyro.conf.Positional[str]
    """folder of the older checkout"""
    new: str = str(ROOT)
    """folder of the newer checkout"""
    networks: tuple[str, ...] = (*NETWORKS, SMALL)
    """backbones, cut into four blocks"""
    ways: tuple[str, ...] = WAYS
    """ways to run: fused, unfused, training"""
    batch_sizes: tuple[int, ...] = (1, 8)
    """images per call of inference"""
    seconds: float = 3.0
    """for the rounds of one cell"""
    rounds: int = 5
    """of one cell at least"""
    record: Path | None = field(default=RECORD)
    """the file that cells are kept in"""
    losses_only: bool = False
    """compare the losses of training, and leave the times as recorded"""


class Checkout:
    """A process that times calls of one checkout."""

    def __init__(self, folder: str) -> None:
        environment = {**os.environ, "PYTHONPATH": folder}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env=environment,
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def time(self, cell: tuple[str, str, int, int], times: int = 1) -> dict[str, float]:
        """Mean seconds of a call over `times` calls, and the peak memory in MB."""
        return self._ask({"cell": cell, "times": times})

    def losses(self, network: str, steps: int) -> list[float]:
        """Of the first training steps, from seeded weights and images."""
        return list(self._ask({"network": network, "steps": steps})["losses"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self.process.kill()


# --- the comparison ---------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Measure, and write the page."""
    file = settings.record
    if settings.losses_only:
        record = json.loads(RECORD.read_text())
        record["training"] = {"commit": commit(settings.new), "losses": trained(settings)}
        write_json(RECORD, record)
        PAGE.write_text(page(record))
        return
    rows: list[dict[str, Any]] = []
    for name, way in product(settings.networks, settings.ways):
        pair = Checkout(settings.old), Checkout(settings.new)
        for cell in cells(name, way, settings.batch_sizes):
            rows.append(measured(*pair, cell, settings.seconds, settings.rounds))
            print(rows[-1], flush=True)
        for checkout in pair:
            checkout.close()
    if file is not None:
        if set(settings.ways) < set(WAYS) and file.exists():  # the other ways stay as they were recorded
            rows = [row for row in json.loads(file.read_text())["rows"] if row["way"] not in settings.ways] + rows
        record = {"old": commit(settings.old), "new": commit(settings.new), "machine": machine(), "rows": rows}
        record["training"] = {"commit": record["new"], "losses": trained(settings)}
        write_json(file, record)
        PAGE.write_text(page(record))
    for way in settings.ways:
        ratios = [row["ratio"] for row in rows if row["way"] == way]
        print(way, f"geometric mean {statistics.geometric_mean(ratios):.3f}, at most {max(ratios):.3f}")


def trained(settings: Settings) -> dict[str, list[list[float]]]:
    """The losses of `STEPS` steps of each network with small inputs, old and new."""
    found = {}
    for name in settings.networks:
        pair = Checkout(settings.old), Checkout(settings.new)
        found[name] = [checkout.losses(name, STEPS) for checkout in pair]
        for checkout in pair:
            checkout.close()
        print(name, max(abs(a - b) / abs(a) for a, b in zip(*found[name], strict=True)), flush=True)
    return found


def cells(name: str, way: str, batch_sizes: tuple[int, ...]) -> Iterator[tuple[str, str, int, int]]:
    """The cells of a network: network, way, batch size, depth."""
    if way == "training":
        yield name, way, 128 if name == SMALL else TRAINING_BATCH, 3
    else:
        for batch, depth in product(batch_sizes, range(4)):
            yield name, way, batch, depth


def measured(
    old: Checkout, new: Checkout, cell: tuple[str, str, int, int], seconds: float, least: int
) -> dict[str, Any]:
    """Time both checkouts in rounds, in alternating order."""
    first = max(checkout.time(cell)["s"] for checkout in (old, new))
    times = max(1, int(0.05 / first))
    rounds = min(MAX_ROUNDS, max(least, int(seconds / (2 * times * first))))
    found: list[tuple[float, float]] = []
    for turn in range(rounds):
        order = (old, new) if turn % 2 else (new, old)
        by = {checkout: checkout.time(cell, times) for checkout in order}
        found.append((by[old]["s"], by[new]["s"]))
    return {
        "network": cell[0],
        "way": cell[1],
        "batch": cell[2],
        "depth": cell[3],
        "old_ms": 1000 * statistics.median(o for o, _ in found),
        "new_ms": 1000 * statistics.median(n for _, n in found),
        "ratio": statistics.median(n / o for o, n in found),
        "peak_mb": [by[checkout]["peak_mb"] for checkout in (old, new)],
    }


def page(record: dict[str, Any]) -> str:
    """The results page."""
    rows, machine = record["rows"], record["machine"]
    summary = []
    for way in dict.fromkeys(row["way"] for row in rows):
        of_way = [row for row in rows if row["way"] == way]
        worst = max(of_way, key=lambda row: row["ratio"])
        summary.append(
            (
                way,
                f"{statistics.geometric_mean(row['ratio'] for row in of_way):.3f}",
                f"{len(of_way)}",
                f"{worst['ratio']:.3f}: {worst['network']}, batch {worst['batch']}, depth {worst['depth']}",
            )
        )
    cells = [
        (
            row["network"],
            row["way"],
            *map(str, (row["batch"], row["depth"])),
            f"{row['old_ms']:.2f}",
            f"{row['new_ms']:.2f}",
            f"{row['ratio']:.3f}",
            " / ".join(f"{peak:.0f}" for peak in row["peak_mb"]),
        )
        for row in rows
    ]
    header = ("network", "way", "batch", "depth", "old (ms)", "new (ms)", "new / old", "peak memory (MB)")
    other = record.get("training_peaks")
    peaks = (
        f"; its peak memory was measured with the commit `{other}`, after conversion had returned freed memory to the\n"
        "system. In the other cells, peak memory includes what conversion had freed"
    ) * bool(other)
    training = [
        (
            name,
            f"{old[0]:.4f}",
            f"{old[-1]:.4f}",
            f"{max(abs(a - b) / abs(a) for a, b in zip(old, new, strict=True)):.1e}",
        )
        for name, (old, new) in record["training"]["losses"].items()
    ]
    first_and_last = ("network", "loss of step 1", f"of step {STEPS}", "largest relative difference, old to new")
    return f"""# Ordinary branches compared with packed ones

In earlier versions, a level packed the weights of its branches into single tensors. Now each branch is an ordinary
module, and a grouped call is derived from the modules when it runs. This page compares the last commit with packed
levels (`{record["old"]}`) and the commit `{record["new"]}`. Each runs in its own process, and the two alternate within
every round. Ratios are medians over rounds; below 1, the new code is faster. *Peak memory*: the largest resident memory
of the process during the calls of a cell, old / new. *training*: forward, loss, backward and SGD step of all eight
networks{peaks}.

Measured on {machine["cores"]} cores of {machine["processor"]} ({machine["instructions"]}), torch {machine["torch"]}.

{table(("way", "geometric mean", "cells", "slowest cell"), summary)}

{table(header, cells)}

Training gives the same losses. From the same seeded weights, {STEPS} steps of SGD with momentum 0.9 in float64 on
random images (batches of 8), with the old commit and `{record["training"]["commit"]}`:

{table(first_and_last, training)}

```bash
python benchmarks/commits.py OLD_CHECKOUT
```
"""


def commit(folder: str) -> str:
    """The commit that a checkout is at."""
    command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
