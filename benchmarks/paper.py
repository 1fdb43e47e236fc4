"""Repeats the HNE paper's comparisons and compares the tree with its alternatives.

python benchmarks/paper.py --data-dir DIR          trains the rows without a record, writes docs/results/cifar100.md
python benchmarks/paper.py --no-train              writes the page from the records
python benchmarks/paper.py --no-train --measure    measures latencies first: run nothing else meanwhile

DIR holds `train` and `test` with a folder per class. Every finished run writes a record under docs/results/runs, and
the page is made from the records only. Interrupted runs are resumed. Several processes can share the work
(`--share 0/2`, `--share 1/2`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from comparison.costs import UNITS, measure, points, read_times, threshold_points
from comparison.differences import Claim, Point, front, front_table, gains, verdicts
from comparison.pages import TITLES, indented, machines, runs
from comparison.pictures import draw_costs
from comparison.recipes import BASE_WIDTH, GROUPS, RECIPES, ROWS, SINGLE_WIDTHS
from comparison.records import DEEP_ENSEMBLE, ROOT, read_records
from comparison.train import train_in_memory, train_missing

from hierens.evaluation.plotting import plot_comparison, plot_leaves
from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group, comparison
from hierens.training.presets import dump_run

RESULTS = ROOT / "docs" / "results"
PAGES = {"cifar100": "cifar100", "cifar10": "cifar10", "fashion_mnist": "paper"}
TABLE1 = ("tree-labels", "tree-hierarchical", "tree-both-labelled", "tree-distilled", "hierarchical-distilled")
FIGURE4 = ("tree-labels", "tree-plain-distillation-small-alpha", "tree-plain-distillation", "tree-distilled")
FIGURE5 = ("tree-distilled", "multi-branch", "independent")
CANDIDATES = ("tree-labels", "tree-with-exits", *GROUPS[4])
SINGLES = tuple(f"single-{width}" for width in SINGLE_WIDTHS)
RIVALS = (
    *(*SINGLES, DEEP_ENSEMBLE, "multi-branch", "exits", "exits-equilibrium", "exits-ensemble", "exits-wide"),
    *("exits-boosted", "exits-collaboration", "msdnet"),
)
TREES = ("hierarchical-distilled", "tree-distilled", "tree-hierarchical", "tree-with-exits")
DRAWN = ("hierarchical-distilled", "tree-distilled", DEEP_ENSEMBLE, "exits-boosted", "exits-wide", "msdnet")
SINGLE = f"single-{BASE_WIDTH}"

CLAIMS = (
    Claim("labels for each network beat labels for nested ensembles", "tree-labels", "tree-hierarchical", "every"),
    Claim("adding L_H to L_I makes the full ensemble worse", "tree-labels", "tree-both-labelled"),
    Claim("L_I + L_HD beats L_I", "tree-distilled", "tree-labels", "every"),
    Claim("L_I + L_HD beats L_H", "tree-distilled", "tree-hierarchical", "every"),
    Claim("L_I + L_HD beats L_I + L_H", "tree-distilled", "tree-both-labelled", "every"),
    Claim("L_H + L_HD, not in the paper, beats L_I + L_HD", "hierarchical-distilled", "tree-distilled", "every"),
    Claim("co-distillation helps one network", "tree-plain-distillation", "tree-labels", "first"),
    Claim("co-distillation makes the full ensemble worse", "tree-labels", "tree-plain-distillation"),
    Claim(
        "with a smaller alpha, the full ensemble is better",
        "tree-plain-distillation-small-alpha",
        "tree-plain-distillation",
    ),
    Claim("hierarchical co-distillation helps one network", "tree-distilled", "tree-labels", "first"),
    Claim("hierarchical co-distillation beats plain co-distillation", "tree-distilled", "tree-plain-distillation"),
    Claim("co-distillation lowers diversity", "tree-labels", "tree-plain-distillation", "last", "std"),
    Claim("hierarchical co-distillation lowers it less", "tree-distilled", "tree-plain-distillation", "last", "std"),
    Claim("the tree beats independent networks", "tree-distilled", "independent", "every"),
    Claim("multi-branch is better for one network", "multi-branch", "tree-distilled", "first"),
    Claim("the full tree is better than full multi-branch", "tree-distilled", "multi-branch"),
    Claim("sharing one trunk lowers diversity", "tree-distilled", "multi-branch", "last", "std"),
    Claim("L_I + L_HD: one network of the tree beats it trained alone", "tree-distilled", SINGLE, "first"),
    Claim("L_H + L_HD: the same", "hierarchical-distilled", SINGLE, "first"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data: Literal["cifar100", "cifar10", "fashion_mnist"] = "cifar100"
    """name of the recipe, from benchmarks/comparison/recipes.py"""
    data_dir: str = ""
    """folder with `train` and `test`, a folder per class in each; for Fashion-MNIST the idx files"""
    runs: Path = Path("runs/comparison")
    """folder for checkpoints and logs"""
    only: tuple[str, ...] = ()
    """rows to train; all by default"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    threads: int = 1
    """CPU threads of training"""
    processes: int = 0
    """number of runs to train at the same time, on the GPU if available, with the images of `joined` in memory"""
    joined: Path = Path("runs/gpu/images")
    """folder of images written by `benchmarks/gpu.py join`"""
    executor: str = "auto"
    """executor of trees, with `processes`"""
    train: bool = True
    """--no-train writes the page from the existing records"""
    measure: bool = False
    """measure the latency of every row before the page is written"""


def main(settings: Settings) -> None:
    """Train the rows without a record, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train and settings.processes:
        train_in_memory(
            settings.data, settings.joined, settings.runs, settings.processes, settings.executor, settings.only
        )
    elif settings.train:
        train_missing(settings.data, settings.data_dir, settings.runs, settings.only, settings.share)
    if settings.measure:
        print(f"wrote {measure(settings.data)}")
    file = RESULTS / f"{PAGES[settings.data]}.md"
    file.write_text(page(settings.data, RESULTS))
    print(f"wrote {file}")


def page(data: str, directory: Path) -> str:
    """The results page; its figures are written to the directory.

    Raises:
        ValueError: there is no record.
    """
    groups, stem = read_records(data), PAGES[data]
    if not groups:
        raise ValueError(f"there is no record of {data}: train some rows first, by --data-dir.")
    some = next(iter(groups.values())).records[0]
    train = some["config"]["train"]
    parts = (_choice, _table1, _orderings, _distillation, _sharing, _candidates)
    body = "\n\n".join(part(groups, directory, stem, data) for part in parts)
    return f"""# The tree on {TITLES[data]}

A tree of eight networks with four blocks is compared with its alternatives. All rows use the same recipe: networks
of the family `resnet8_cifar` (stem of stride 2; {BASE_WIDTH}, {2 * BASE_WIDTH} and {4 * BASE_WIDTH} channels
unless stated otherwise), {train["epochs"]} epochs, AdamW, crops and flips, float32. Accuracies are on
{some["test_images"]:,} test images. Rows have up to eight seeds, listed at the end.
Differences are paired by seed and given with their standard errors. *yes* and *no* mean that a difference exceeds
twice its standard error.

{body}

## How to repeat it

```bash
python benchmarks/paper.py --data {data} --data-dir DIR              # trains the rows that have no record yet
python benchmarks/paper.py --data {data} --processes 12              # the same on a GPU; --help describes the images
python benchmarks/paper.py --data {data} --no-train --measure        # this page, with latencies of your machine
```

{runs(groups)}

{machines(groups)}

??? note "The recipe"

    ```yaml
    {indented(dump_run(RECIPES[data]))}
    ```
"""


def _choice(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    """The most accurate rows at each cost."""
    shown = {row: _counted(groups[row], row) for row in (*TREES, *RIVALS) if row in groups}
    if not shown.keys() & {*RIVALS}:
        return "Only trees were trained on this data set."
    times = read_times(data)
    panels, tables = {}, []
    for unit, label in UNITS.items():
        of_unit = points(shown, unit, times.get("milliseconds", {}))
        if unit == "macs":
            of_unit |= {f"{row}+": threshold_points(shown[row]) for row in TREES if row in shown}
        if all_points := [point for of_row in of_unit.values() for point in of_row]:
            panels[label] = _drawn(of_unit)
            tables.append(f"### By {label}\n\n{_sentence(all_points, label)}\n\n{front_table(all_points, label)}")
    draw_costs(panels, directory / f"{stem}_costs.png")
    titles = {**{row: entry.title for row, entry in ROWS.items()}, DEEP_ENSEMBLE: "deep ensemble"}
    missing = ", ".join(titles[row] for row in (*TREES, *RIVALS) if row not in shown)
    missing = f"**Not run yet, and therefore not in this comparison: {missing}.**\n\n" if missing else ""
    whole = [
        (group.name, f"{group.records[0]['parameters'][-1] * 4 / 1e6:.2f}")
        for row, group in shown.items()
        if row not in SINGLES
    ]
    if all(row in shown for row in SINGLES):
        total = sum(shown[row].records[0]["parameters"][-1] for row in SINGLES)
        whole.append((f"{len(SINGLES)} single networks together", f"{total * 4 / 1e6:.2f}"))
    return f"""## The best choice for a budget

![Accuracy against MACs, latency and megabytes]({stem}_costs.png)

{missing}The tables list the Pareto front: the rows and depths for which no cheaper one has at least the same mean
accuracy. Differences between neighbours may be within the noise.

{chr(10).join(f"{part}{chr(10)}" for part in tables)}
### To serve every budget from one machine

Megabytes of float32 weights for all depths of a row:

{table(("", "MB"), whole)}"""


def _counted(group: Group, row: str) -> Group:
    """The row, with its number of seeds in the title if runs are missing."""
    few = row in ROWS and len(group.records) < len(ROWS[row].seeds)
    return dataclasses.replace(group, name=f"{group.name} (seeds: {len(group.records)})") if few else group


def _drawn(of_unit: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """The rows shown in the figure; the single networks form one curve."""
    curves = {row: list(of_unit[row]) for row in DRAWN if of_unit.get(row)}
    singles = [point for row in SINGLES for point in of_unit.get(row, ())]
    if singles:
        title = f"separately trained networks, {', '.join(map(str, SINGLE_WIDTHS))} channels"
        curves["singles"] = [dataclasses.replace(point, row=title) for point in singles]
    first = next((row for row in TREES if of_unit.get(f"{row}+")), None)
    return curves | ({"thresholds": list(of_unit[f"{first}+"])} if first else {})


def _sentence(of_all: Sequence[Point], label: str) -> str:
    """The best rows by range of cost, in words."""
    kept = front(of_all)
    runs: list[tuple[str, float, float]] = []
    for point in kept:
        name = point.row.removesuffix(", thresholds")
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], point.cost)
        else:
            runs.append((name, point.cost, point.cost))
    said = [
        f"{name} from {low:.2f} to {high:.2f}" if high > low else f"{name} at {low:.2f}" for name, low, high in runs
    ]
    return f"Best choice by {label}: {'; '.join(said)}."


def _table1(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    found = _found(groups, TABLE1)
    if not found:
        return "## Table 1: objectives\n\nNot run yet."
    plot_comparison(found, directory / f"{stem}_table1.png")
    return f"""## Table 1: objectives

Accuracy (%) by number of networks, mean ± standard deviation over seeds.

![Accuracy and diversity by objective]({stem}_table1.png)

{comparison(found)}

Expected calibration error (15 bins):

{comparison(found, "ece", 3)}"""


def _orderings(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    return f"""## Which of the paper's orderings hold

Differences in accuracy (points), or in the logits' standard deviation, at each depth that the claim is about.

{verdicts(groups, CLAIMS)}"""


def _distillation(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    found = _found(groups, FIGURE4)
    if len(found) < 2:
        return "## Figure 4: distillation\n\nNot run yet."
    plot_comparison(found, directory / f"{stem}_figure4.png")
    plot_leaves(found, directory / f"{stem}_leaves.png")
    return f"""## Figure 4: distillation

![Accuracy and diversity by distillation]({stem}_figure4.png)

{comparison(found)}

Standard deviation of the logits over the networks evaluated, mean over classes and images:

{comparison(found, "std", 3)}

As in figure 9: each network alone (bars), and the ensembles of the first networks:

![Accuracy of single networks and of ensembles]({stem}_leaves.png)"""


def _sharing(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    found = _found(groups, FIGURE5)
    if len(found) < 2:
        return "## Figure 5: sharing schemes\n\nNot run yet."
    plot_comparison(found, directory / f"{stem}_figure5.png")
    return f"""## Figure 5: sharing schemes

All trained with L_I + L_HD.

![Accuracy and diversity by sharing scheme]({stem}_figure5.png)

{comparison(found)}"""


def _candidates(groups: Mapping[str, Group], directory: Path, stem: str, data: str) -> str:
    return f"""## What beats the paper's objective

Gain in points over L_I + L_HD at the same number of epochs, including the variants that are worse.

{gains(groups, "tree-distilled", CANDIDATES)}"""


def _found(groups: Mapping[str, Group], rows: Sequence[str]) -> list[Group]:
    return [groups[row] for row in rows if row in groups]


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
