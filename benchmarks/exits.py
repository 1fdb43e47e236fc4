"""Multi-exit networks beside each other and beside trees, on one recipe.

python benchmarks/exits.py --data-dir DIR     trains what has no record yet, then writes docs/results/cifar100_exits.md
python benchmarks/exits.py --no-train         the page from the records alone

The recipe, the records and the trees are those of benchmarks/paper.py.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from comparison.costs import UNITS, points, read_times
from comparison.differences import Claim, difference, front_table, verdicts
from comparison.equilibrium import read_variances, write_variances
from comparison.pages import TITLES
from comparison.pictures import draw_costs
from comparison.recipes import BASE_WIDTH
from comparison.records import ROOT, TOLERANCE, read_records
from comparison.train import train_missing

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group, comparison

RESULTS = ROOT / "docs" / "results"
PAGES = {"cifar100": "cifar100_exits", "cifar10": "cifar10_exits", "fashion_mnist": "exits"}
TREES_PAGES = {"cifar100": "cifar100", "cifar10": "cifar10", "fashion_mnist": "paper"}
SINGLE = f"single-{BASE_WIDTH}"
IMTA = ("exits", "exits-equilibrium", "exits-collaboration", "exits-one-for-all", "exits-imta", "exits-wide")
AEP = (
    "exits-uniform",
    "exits-linear-rising",
    "exits-geometric-rising",
    "exits-geometric-falling",
    "exits-ensemble",
    "exits-hybrid",
)
TREES = ("tree-labels", "tree-distilled", "tree-with-exits")
CLAIMS = (
    Claim("equilibrium helps multi-exit training (IMTA, section 4.2)", "exits-equilibrium", "exits", "every"),
    Claim("collaboration helps later exits (IMTA)", "exits-collaboration", "exits"),
    Claim("one-for-all distillation helps early exits (IMTA)", "exits-one-for-all", "exits", "first"),
    Claim("all three together beat joint training (IMTA)", "exits-imta", "exits", "every"),
)


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    data: Literal["cifar100", "cifar10", "fashion_mnist"] = "cifar100"
    """the recipe; benchmarks/comparison/recipes.py holds them"""
    data_dir: str = ""
    """folder with `train` and `test`, a folder per class in each; for Fashion-MNIST the idx files"""
    runs: Path = Path("runs/comparison")
    """folder for checkpoints and logs"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    threads: int = 1
    """CPU threads of training"""
    train: bool = True
    """--no-train writes the page from the records that are there"""


def main(settings: Settings) -> None:
    """Train what is missing, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        write_variances(settings.data, settings.data_dir)
        rows = dict.fromkeys((SINGLE, *IMTA, *AEP, *TREES))
        train_missing(settings.data, settings.data_dir, settings.runs, rows, settings.share)
    file = RESULTS / f"{PAGES[settings.data]}.md"
    file.write_text(page(settings.data, RESULTS))
    print(f"wrote {file}")


def page(data: str, directory: Path) -> str:
    """The results page; its pictures are drawn into the directory.

    Raises:
        ValueError: no network with exits has a record.
    """
    groups, stem = read_records(data), PAGES[data]
    shown = {row: groups[row] for row in (SINGLE, *IMTA, *TREES) if row in groups}
    weighted = {row: groups[row] for row in AEP if row in groups}
    if "exits" not in groups:
        raise ValueError(f"there is no record of exits on {data}: train them first, by --data-dir.")
    record = groups["exits"].records[0]
    draw_costs(_panels(shown, data), directory / f"{stem}.png")
    draw_costs(_panels(weighted | {"exits": groups["exits"]}, data), directory / f"{stem}_weights.png")
    everything = [p for of in points(shown | weighted, "macs", {}).values() for p in of]
    return f"""# Multi-exit networks on {TITLES[data]}

[Multi-exit networks](../explanation/exits.md) of one backbone beside the [trees]({TREES_PAGES[data]}.md) made of
it: {record["test_images"]:,} test images, `resnet8_cifar` with {BASE_WIDTH}, {2 * BASE_WIDTH} and {4 * BASE_WIDTH}
channels, {record["config"]["train"]["epochs"]} epochs, AdamW, one recipe for all, up to three seeds. Early exits have
convolutional heads. Depths of a network with exits are its exits; those of a tree are 1, 2, 4 and 8 networks; a tree
with exits has three exits before them.

![Accuracy against multiply-accumulates and against time]({stem}.png)

What a given cost is best spent on: of all networks and depths on this page, those that nothing cheaper reaches in mean
accuracy.

{front_table(everything, UNITS["macs"])}

{comparison(list(shown.values()))}

One-for-all distillation has gamma 0.9 and T 3, after one epoch of labels.

{verdicts(groups, CLAIMS)}

{_single(groups)}

## Exits on a tree

The same tree with three exits on the way to its first network, beside the exits without a tree and the tree without
exits: differences in points, paired by seed, with their standard errors.

{on_a_tree(groups)}

## Gradient equilibrium

The variance of each block's gradient over 40 batches of 32 images, before training, as a multiple of the mean variance
of the gradients that the single exits behind it send. IMTA argues that equilibrium bounds it: of a mean, at most 1.

{_variances(data)}

## Weighted ensembles of exits (AEP)

![Accuracy of weighted ensembles]({stem}_weights.png)

Trained on every exit's loss and the ensemble's. Accuracy of the ensembles of the first 1 to 4 exits:

{comparison(list(weighted.values())) if weighted else "Not run yet."}

After `prune(tolerance={TOLERANCE}, batches)`, chosen on one half of the test images and judged on the other: exits with
a smaller share of the weights go, and all beyond the depth at which the ensemble answers best. Kept exits are those of
each seed; the last three columns say how much was saved.

{pruned(list(weighted.values()))}

## How to repeat it

```bash
python benchmarks/exits.py --data {data} --data-dir DIR
```
"""


def on_a_tree(groups: Mapping[str, Group]) -> str:
    """What exits and networks give each other, where they share a trunk."""
    both = groups.get("tree-with-exits")
    if both is None:
        return "Not run yet."
    early = len(both.macs) - len(groups["tree-distilled"].macs) if "tree-distilled" in groups else 0
    rows = []
    for text, other, part in (
        (f"exits 1 to {early}, over exits", groups.get("exits"), slice(0, early)),
        ("1, 2, 4, 8 networks, over tree, L_I + L_HD", groups.get("tree-distilled"), slice(early, None)),
    ):
        if other is not None and early:
            own = Group(both.name, both.macs[part], [{**r, "accuracy": r["accuracy"][part]} for r in both.records])
            cells = list(map(str, difference(own, other)))
            rows.append((text, *cells, *[""] * (4 - len(cells))))
    return table((both.name, *[""] * 4), rows) if rows else "Not run yet."


def pruned(groups: Sequence[Group]) -> str:
    """The weightings before and after pruning."""
    rows = []
    for group in groups:
        found = [record["pruning"] for record in group.records if "pruning" in record]
        if found:
            weights = [statistics.mean(of) for of in zip(*(p["weights"] for p in found), strict=True)]
            saved = (statistics.mean(p["saved"][name] for p in found) for name in ("parameters", "macs"))
            rows.append(
                (
                    group.name,
                    " ".join(f"{weight:.2f}" for weight in weights),
                    ", ".join("".join(str(exit + 1) for exit in p["kept"]) for p in found),
                    f"{statistics.mean(p['before'] for p in found):.2f}",
                    f"{statistics.mean(p['after'] for p in found):.2f}",
                    *(f"{100 * share:.0f} %" for share in saved),
                )
            )
    header = ("weights", "of exits 1 to 4", "exits kept", "before (%)", "after (%)", "parameters", "MACs")
    return table(header, rows) if rows else "Not run yet."


def _single(groups: Mapping[str, Group]) -> str:
    if SINGLE not in groups:
        return ""
    last = Group("", [0.0], [{**r, "accuracy": r["accuracy"][-1:]} for r in groups["exits"].records])
    found = difference(last, groups[SINGLE])
    return (
        f"What early exits give the last one over the same network without exits: {found[0]} points." if found else ""
    )


def _panels(groups: Mapping[str, Group], data: str) -> dict[str, dict[str, list]]:
    times = read_times(data).get("milliseconds", {})
    units = ("macs", "ms") if times else ("macs",)
    return {UNITS[unit]: points(groups, unit, times) for unit in units}


def _variances(data: str) -> str:
    rows = [
        (str(row["block"]), str(row["exits"]), f"{row['sum']:.2f}", f"{row['equilibrium']:.2f}")
        for row in read_variances(data)
    ]
    header = ("block", "exits behind it", "sum of the losses", "gradient equilibrium")
    return table(header, rows) if rows else "Not run yet."


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
