"""Compares trees whose branches share weights with full trees, on one recipe.

python benchmarks/members.py --data-dir DIR     trains the rows without a record, writes docs/results/members.md
python benchmarks/members.py --no-train         writes the page from the records

The recipe, the records and the other rows are those of benchmarks/paper.py.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from comparison.costs import UNITS, points, read_times
from comparison.differences import front_table, gains
from comparison.pages import machines, runs
from comparison.pictures import draw_costs
from comparison.recipes import BASE_WIDTH, LIGHT
from comparison.records import DEEP_ENSEMBLE, ROOT, read_records
from comparison.train import train_missing

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group, comparison

RESULTS = ROOT / "docs" / "results"
SMALL, ENOUGH = 1.3, 0.75  # memory in networks, and share of the gain, that light members were made for
DATA, FULL, SINGLE = "cifar100", "hierarchical-distilled", f"single-{BASE_WIDTH}"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str = ""
    """folder with `train` and `test`, a folder per class in each"""
    runs: Path = Path("runs/comparison")
    """folder for checkpoints and logs"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    threads: int = 1
    """CPU threads of training"""
    train: bool = True
    """--no-train writes the page from the existing records"""


def main(settings: Settings) -> None:
    """Train the rows without a record, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        train_missing(DATA, settings.data_dir, settings.runs, (SINGLE, FULL, *LIGHT), settings.share)
    file = RESULTS / "members.md"
    file.write_text(page(RESULTS))
    print(f"wrote {file}")


def page(directory: Path) -> str:
    """The results page; its figure is written to the directory.

    Raises:
        ValueError: there is no full tree, or no tree with light members.
    """
    records = read_records(DATA)
    groups = {row: records[row] for row in (SINGLE, DEEP_ENSEMBLE, FULL, *LIGHT) if row in records}
    light = {row: group for row, group in groups.items() if row in LIGHT}
    if FULL not in groups or SINGLE not in groups or not light:
        raise ValueError(f"{DATA} needs records of {SINGLE}, {FULL} and a tree with light members: train them first.")
    times = read_times(DATA).get("milliseconds", {})
    panels = {label: points(groups, unit, times) for unit, label in UNITS.items()}
    panels = {label: rows for label, rows in panels.items() if any(rows.values())}
    draw_costs(panels, directory / "members.png")
    first = groups[FULL].records[0]
    fronts = [front_table([point for row in rows.values() for point in row], label) for label, rows in panels.items()]
    missing = [row for row in LIGHT if row not in light]
    return f"""# Light members on CIFAR-100

Trees whose branches share the weights of dense layers ([how they work](../how-to/light.md)) are compared with a full
tree, a single network and deep ensembles: `resnet8_cifar` with {BASE_WIDTH}, {2 * BASE_WIDTH} and {4 * BASE_WIDTH}
channels, eight leaves, {first["config"]["train"]["epochs"]} epochs, AdamW, L_H + L_HD for all trees, the recipe of
[CIFAR-100](cifar100.md). *early*: levels 1 and 2 are light and the last is full; *late*: the last level is light.

![Accuracy against costs](members.png)

{_memory(groups)}

*gain kept*: of the gain of the full tree's eight networks over a single network. {_conclusion(groups)}

{comparison(list(groups.values()))}

{gains(records, FULL, list(light))}

The Pareto front of this page: the networks and depths for which no cheaper one has at least the same mean accuracy.

{(chr(10) * 2).join(fronts)}

{f"Not run yet: {', '.join(missing)}." if missing else ""}

## How to repeat it

```bash
python benchmarks/members.py --data-dir DIR
```

{runs(groups)}

{machines(groups)}
"""


def _kept(groups: Mapping[str, Group]) -> dict[str, tuple[float, float]]:
    """By row: the weights at full depth, as a multiple of one network's, and the share of the full tree's gain."""
    one, best = groups[SINGLE].mean("accuracy")[-1], groups[FULL].mean("accuracy")[-1]
    network = groups[SINGLE].records[0]["parameters"][-1]
    return {
        row: (group.records[0]["parameters"][-1] / network, (group.mean("accuracy")[-1] - one) / (best - one))
        for row, group in groups.items()
    }


def _conclusion(groups: Mapping[str, Group]) -> str:
    """How much of the gain light members keep, and for which memory."""
    kept = {groups[row].name: found for row, found in _kept(groups).items() if row in LIGHT}
    small = max((name for name, (size, _) in kept.items() if size <= SMALL), key=lambda n: kept[n][1], default="")
    enough = min((name for name, (_, gain) in kept.items() if gain >= ENOUGH), key=lambda n: kept[n][0], default="")
    said = []
    if small:
        said.append(
            f"Among the light trees with at most {SMALL} times one network's memory, *{small}* keeps the most, "
            f"{kept[small][1]:.0%}."
        )
    if enough:
        said.append(
            f"*{enough}* is the smallest light tree that keeps {ENOUGH:.0%}, with {kept[enough][0]:.1f} times one "
            "network's memory."
        )
    return " ".join(said) or f"No light tree keeps {ENOUGH:.0%}."


def _memory(groups: Mapping[str, Group]) -> str:
    """Weights at full depth, as a multiple of one network's, with accuracy and diversity."""
    rows = []
    for row, (size, gain) in _kept(groups).items():
        group = groups[row]
        diversity = statistics.mean(record["std"][-1] for record in group.records)
        rows.append(
            (
                group.name,
                f"{4 * group.records[0]['parameters'][-1] / 1e6:.2f}",
                f"{size:.2f}",
                f"{group.mean('accuracy')[-1]:.2f}",
                f"{100 * gain:.0f} %",
                f"{diversity:.3f}",
            )
        )
    return table(("all networks", "MB", "times one network", "accuracy (%)", "gain kept", "std of leaves"), rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
