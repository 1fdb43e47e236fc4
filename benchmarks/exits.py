"""Compares multi-exit networks with each other and with trees, on one recipe.

python benchmarks/exits.py --data-dir DIR     trains the rows without a record, writes docs/results/cifar100_exits.md
python benchmarks/exits.py --no-train         writes the page from the records
python benchmarks/exits.py --no-train --measure    measures the time that early exit saves before it writes the page

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
from comparison import budgets
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
PAGES = {"cifar100": "cifar100_exits", "cifar10": "cifar10_exits", "fashion_mnist": "fashion_mnist_exits"}
TREES_PAGES = {"cifar100": "cifar100", "cifar10": "cifar10", "fashion_mnist": "paper"}
SINGLE = f"single-{BASE_WIDTH}"
IMTA = (
    *("exits", "exits-equilibrium", "exits-collaboration", "exits-one-for-all", "exits-one-for-all-mean"),
    *("exits-one-for-all-averaged", "exits-imta", "exits-imta-mean", "exits-two-stages", "exits-wide"),
)
BOOSTED = "exits-boosted"
MSDNETS = ("msdnet", "msdnet-imta-mean")
AEP = (
    "exits-uniform",
    "exits-linear-rising",
    "exits-geometric-rising",
    "exits-geometric-falling",
    "exits-ensemble",
    "exits-hybrid",
)
TREES = ("tree-labels", "tree-distilled", "hierarchical-distilled", "tree-with-exits")
SHOWN = (SINGLE, *IMTA, BOOSTED, *MSDNETS, *TREES)
DRAWN = (
    *(SINGLE, "exits", "exits-collaboration", "exits-one-for-all-mean", "exits-two-stages", BOOSTED, "exits-wide"),
    *("msdnet", "hierarchical-distilled", "tree-with-exits"),
)
CLAIMS = (
    Claim("equilibrium helps multi-exit training (IMTA, section 4.2)", "exits-equilibrium", "exits", "every"),
    Claim("collaboration helps later exits (IMTA)", "exits-collaboration", "exits"),
    Claim("one-for-all distillation helps early exits (IMTA)", "exits-one-for-all", "exits", "first"),
    Claim("the same, mean over classes", "exits-one-for-all-mean", "exits", "first"),
    Claim("the same, teacher of averaged weights", "exits-one-for-all-averaged", "exits", "first"),
    Claim("boosted exits beat joint training (BoostNet)", BOOSTED, "exits", "every"),
    Claim("all three together beat joint training (IMTA)", "exits-imta", "exits", "every"),
    Claim("the same, mean over classes", "exits-imta-mean", "exits", "every"),
    Claim("the same, in two stages", "exits-two-stages", "exits", "every"),
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
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    threads: int = 1
    """CPU threads of training"""
    train: bool = True
    """--no-train writes the page from the existing records"""
    measure: bool = False
    """measure the time that early exit saves before the page is written"""


def main(settings: Settings) -> None:
    """Train the rows without a record, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        write_variances(settings.data, settings.data_dir)
        rows = dict.fromkeys((*SHOWN, *AEP))
        train_missing(settings.data, settings.data_dir, settings.runs, rows, settings.share)
    if settings.measure:
        print(f"wrote {budgets.measure(settings.data)}")
    file = RESULTS / f"{PAGES[settings.data]}.md"
    file.write_text(page(settings.data, RESULTS))
    print(f"wrote {file}")


def page(data: str, directory: Path) -> str:
    """The results page; its figures are written to the directory.

    Raises:
        ValueError: no network with exits has a record.
    """
    groups, stem = read_records(data), PAGES[data]
    shown = {row: groups[row] for row in SHOWN if row in groups}
    weighted = {row: groups[row] for row in AEP if row in groups}
    if "exits" not in groups:
        raise ValueError(f"there is no record of exits on {data}: train them first, by --data-dir.")
    record = groups["exits"].records[0]
    drawn = {row: group for row, group in shown.items() if row in DRAWN}
    draw_costs(_panels(drawn, data), directory / f"{stem}.png")
    draw_costs(_panels(weighted | {"exits": groups["exits"]}, data), directory / f"{stem}_weights.png")
    adaptive = {row: group for row, group in (shown | weighted).items() if len(group.macs) > 1}
    curves = {row: budgets.curve(group) for row, group in adaptive.items() if row in (*DRAWN, "exits-ensemble")}
    draw_costs({"mean million MACs per image": curves}, directory / f"{stem}_budgets.png")
    fronts = [
        front_table([point for of_row in rows.values() for point in of_row], label)
        for label, rows in _panels(shown | weighted, data).items()
    ]
    return f"""# Multi-exit networks on {TITLES[data]}

[Multi-exit networks](../explanation/exits.md) are compared with [trees]({TREES_PAGES[data]}.md) of the same backbone:
{record["test_images"]:,} test images, `resnet8_cifar` with {BASE_WIDTH}, {2 * BASE_WIDTH} and {4 * BASE_WIDTH}
channels, {record["config"]["train"]["epochs"]} epochs, AdamW, one recipe for all, up to three seeds. Early exits have
convolutional heads. The depths of a multi-exit network are its exits. The depths of a tree are 1, 2, 4 and 8 networks;
a tree with exits has three exits before them.

![Accuracy against multiply-accumulates and against time]({stem}.png)

The Pareto front of this page: the networks and depths for which no cheaper one has at least the same mean accuracy.

{(chr(10) * 2).join(fronts)}

{comparison(list(shown.values()))}

One-for-all distillation uses gamma = 0.9 and T = 3, after one epoch with labels only. *(mean)*: its divergence is
averaged over the classes, as in the authors' code, instead of summed. The pictures show some of the rows.

{verdicts(groups, CLAIMS)}

{_single(groups)}

## Budgeted batch classification

Each image leaves at the first depth whose confidence (largest softmax probability) reaches a threshold. The rule for
the thresholds is that of MSDNet ([arXiv 1703.09844](https://arxiv.org/abs/1703.09844)): the shares of the images that
leave at depths 0, 1, 2, ... are a geometric sequence. `calibrate` and `budgeted_batch` find its ratio for a mean cost.
The recipe keeps no validation images, so the thresholds are chosen on one half of the test images and evaluated on the
other, in both directions.

![Accuracy against mean multiply-accumulates]({stem}_budgets.png)

Accuracy (%) at a mean cost, interpolated linearly between budgets. In brackets: difference in points from fixed depths,
also interpolated (the depth of each image is drawn at random), paired by seed, with its standard error.

{budgets.at_equal_cost(adaptive)}

**Simulated and real.** The public code of IMTA's authors, also for MSDNet
([adaptive_inference.py](https://github.com/kalviny/IMTA/blob/master/adaptive_inference.py)), simulates early exit: it
computes the logits of all exits for all images, looks up where each image would leave, and adds up the operations of
these exits. Nothing is skipped and no time is measured. The curves above are computed in the same way. The policy
`Confidence` skips what an image does not need: images leave the batch. The following was measured with it, on networks
with random weights and {budgets.IMAGES} images of noise. Thresholds follow from the shares that leave, so the costs are
those of trained networks with the same budget. Savings are relative to a forward pass at full depth, which may run
several branches of a tree in one call; the policy runs one network after the other. *budget*: from the cost of the
first depth (0 %) to full cost (100 %). *time per MACs*: saved time as a multiple of saved MACs, mean over budgets.

{budgets.saved(data)}

## Exits on a tree

The tree with three exits on the path to its first network, compared with the exits without a tree and the tree without
exits: differences in points, paired by seed, with their standard errors.

{on_a_tree(groups)}

## Gradient equilibrium

The variance of each block's gradient over 40 batches of 32 images, before training, as a multiple of the mean variance
of the gradients from the single exits behind it. According to IMTA, equilibrium bounds it: the variance of a mean of
gradients is at most 1 in this unit.

{_variances(data)}

## Weighted ensembles of exits (AEP)

![Accuracy of weighted ensembles]({stem}_weights.png)

Trained with the losses of all exits and of the ensemble. Accuracy of the ensembles of the first 1 to 4 exits:

{comparison(list(weighted.values())) if weighted else "Not run yet."}

AEP's abstract claims gains in mean accuracy of up to 15 % over training without ensembles, and that pruning with hybrid
weights saves up to 41 % of the parameters, 18 % of the operations and 16 % of the latency. How it does so is not in the
abstract: weights, loss and pruning here are [our interpretation](../explanation/exits.md#ensembles-of-exits-aep).
Results of `prune(tolerance={TOLERANCE}, batches)` with one half of the test images, evaluated on the other half. It
removes the exits with a smaller share of the weights, and all exits after the depth at which the ensemble is most
accurate. *exits kept*: per seed. The last two columns list the savings.

{pruned(list(weighted.values()))}

## How to repeat it

```bash
python benchmarks/exits.py --data {data} --data-dir DIR
```
"""


def on_a_tree(groups: Mapping[str, Group]) -> str:
    """Exits and networks of a tree with exits, compared with exits alone and networks alone."""
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
    """A table of the weightings before and after pruning."""
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
    return f"Gain of the last exit over the same network without early exits: {found[0]} points." if found else ""


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
