"""Multi-exit networks beside each other and beside trees, on one recipe; writes docs/results/exits.md and its pictures.

python benchmarks/exits.py --data-dir DIR          trains what is missing under runs/exits, then writes the page
python benchmarks/exits.py --no-train              the page from the runs that are there

The recipe and the trees are those of benchmarks/paper.py. Several processes can share the work (`--share 0/2`).
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paper
import timm
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import hierens
from hierens.metrics import evaluate_model
from hierens.profiling import latency, millions, table
from hierens.reporting import Group, comparison
from hierens.training.data import create_datasets
from hierens.training.run import Run, create_ensemble

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
EXITS: dict[str, Any] = {"method": "multi_exit", "exits": 4, "head": "conv"}
GE: dict[str, Any] = {"gradient_equilibrium": True}
ISC: dict[str, Any] = {"collaborate": True}
# The first epoch's teacher knows nothing yet: labels begin.
OFA: dict[str, Any] = {"objective": "one_for_all", "alpha": 0.9, "temperature": 3.0, "alpha_warmup_epochs": 1}
BOTH: dict[str, Any] = {"objective": "independent+ensemble"}
PLAIN, BASE, ALL = "plain network", "exits", "exits, GE + ISC + OFA"
IMTA: dict[str, dict[str, Any]] = {
    PLAIN: {"method": "multi_exit", "exits": 1},
    BASE: EXITS,
    "exits, GE": EXITS | GE,
    "exits, ISC": EXITS | ISC,
    "exits, OFA": EXITS | OFA,
    ALL: EXITS | GE | ISC | OFA,
}
AEP: dict[str, dict[str, Any]] = {
    "uniform": EXITS | BOTH | {"exit_weights": "uniform"},
    "linear, rising": EXITS | BOTH | {"exit_weights": "linear_rising"},
    "geometric, rising": EXITS | BOTH | {"exit_weights": "geometric_rising"},
    "geometric, falling": EXITS | BOTH | {"exit_weights": "geometric_falling"},
    "learned": EXITS | BOTH | {"exit_weights": "uniform", "learn_weights": True},
    "hybrid": EXITS | BOTH | {"exit_weights": "geometric_rising", "learn_weights": True},
}
ON_TREE = "tree with exits, L_I + L_HD"
# By the studies of benchmarks/paper.py. The exits on the tree are those of BASE but the last.
TREES = {
    "tree, L_I": ("table1", "L_I"),
    "tree, L_I + L_HD": ("table1", "L_I + L_HD"),
    ON_TREE: ("better", paper.WITH_EXITS),
}
TOLERANCE = 0.1


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    data_dir: str = ""
    """where the data lies"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs"""
    threads: int = 1
    """CPU threads"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    train: bool = True
    """--no-train writes the page from the runs that are there"""


def main(settings: Settings) -> None:
    """Train what is missing, then write the page."""
    torch.set_num_threads(settings.threads)
    if settings.train:
        runs = [configured(settings, c, seed) for seed in settings.seeds for c in (IMTA | AEP).values()]
        paper.train_missing(runs, settings.share)
    (RESULTS / "exits.md").write_text(page(settings))
    print(f"wrote {RESULTS / 'exits.md'}")


def configured(settings: Settings, changes: dict[str, Any], seed: int) -> Run:
    """The recipe of the paper's comparisons with another model and objective."""
    run = paper.recipe(paper.Settings(data_dir=settings.data_dir))
    named = "-".join(f"{key}={value}" for key, value in sorted(changes.items()) if key != "method")
    folder = f"runs/exits/fashion_mnist/{named}/{seed}"
    return paper.changed(run, {"objective": "independent"} | changes, seed, folder)


# --- what came of it ------------------------------------------------------------------------------------------------


def finished(settings: Settings, study: dict[str, dict[str, Any]]) -> dict[str, Group]:
    """The rows of a study that have runs."""
    return paper.read_finished(
        {name: [configured(settings, changes, seed) for seed in settings.seeds] for name, changes in study.items()}
    )


def trees(settings: Settings) -> dict[str, Group]:
    """The trees of the paper's comparisons."""
    of_paper = paper.Settings(data_dir=settings.data_dir, seeds=settings.seeds)
    studies = {study: paper.trained(of_paper, study) for study, _ in TREES.values()}
    found = {name: studies[study].get(row) for name, (study, row) in TREES.items()}
    return {name: dataclasses.replace(group, name=name) for name, group in found.items() if group}


def model_of(settings: Settings, changes: dict[str, Any], seed: int) -> Any:
    """A trained network."""
    return hierens.from_pretrained(Path(configured(settings, changes, seed).train.output_dir) / "model")


def latencies(settings: Settings, names: list[str]) -> dict[str, list[float]]:
    """Milliseconds of every depth for one image; all networks in turn, medians of rounds."""
    of_paper = paper.Settings(data_dir=settings.data_dir)
    models = {}
    for name in names:
        if name in TREES:
            study, row = TREES[name]
            run = paper.configured(of_paper, paper.STUDIES[study][row], settings.seeds[0])
            models[name] = hierens.from_pretrained(Path(run.train.output_dir) / "model")
        else:
            models[name] = model_of(settings, (IMTA | AEP)[name], settings.seeds[0])
    image = torch.randn(1, 1, 28, 28)
    rounds = [
        {n: [latency(m, image, depth, 0.1) for depth in range(m.depths)] for n, m in models.items()} for _ in range(5)
    ]
    return {name: [statistics.median(of) for of in zip(*(r[name] for r in rounds), strict=True)] for name in names}


def pruned(settings: Settings, groups: dict[str, Group]) -> str:
    """AEP's weightings before and after pruning, judged on the half of the test images that did not choose."""
    _, images = create_datasets(paper.recipe(paper.Settings(data_dir=settings.data_dir)).data)
    chosen, judged = (DataLoader(Subset(images, range(i, len(images), 2)), 500) for i in (0, 1))
    rows = []
    for name in AEP:
        if name not in groups:
            continue
        kept_by_seed, before, after, saved, weights = [], [], [], [], []
        for seed in settings.seeds[: len(groups[name].records)]:
            model = model_of(settings, AEP[name], seed)
            pruning = model.prune(TOLERANCE, chosen)
            kept_by_seed.append("".join(str(exit + 1) for exit in pruning.kept))
            before.append(evaluate_model(model, judged).accuracy[-1])
            after.append(evaluate_model(pruning.model, judged).accuracy[-1])
            saved.append(
                [
                    1 - getattr(pruning.after, f) / getattr(pruning.before, f)
                    for f in ("parameters", "macs", "latency_ms")
                ]
            )
            weights.append(model.weights.tolist())
        mean_weights = [statistics.mean(of) for of in zip(*weights, strict=True)]
        rows.append(
            (
                name,
                " ".join(f"{weight:.2f}" for weight in mean_weights),
                ", ".join(kept_by_seed),
                f"{statistics.mean(before):.2f}",
                f"{statistics.mean(after):.2f}",
                *(f"{100 * statistics.mean(of):.0f} %" for of in zip(*saved, strict=True)),
            )
        )
    header = ("weights", "of exits 1 to 4", "exits kept", "before (%)", "after (%)", "parameters", "MACs", "latency")
    return table(header, rows) if rows else "not run."


def variances(settings: Settings, batches: int = 40) -> str:
    """The variance of every block's gradient over batches, beside the mean of that of the single exits' gradients."""
    run = configured(settings, EXITS, settings.seeds[0])
    model = create_ensemble(run, 10).train()
    train_set, _ = create_datasets(run.data)
    loader = iter(DataLoader(train_set, 32, shuffle=True, generator=torch.Generator().manual_seed(0)))
    kept: dict[str, list[list[torch.Tensor]]] = {
        "sum": [],
        "equilibrium": [],
        **{f"{i}": [] for i in range(model.leaves)},
    }
    for images, labels in (next(loader) for _ in range(batches)):
        for way, gradients in kept.items():
            model.gradient_equilibrium = way == "equilibrium"
            model.zero_grad()
            logits = model(images, reduce=False)
            losses = torch.stack([cross_entropy(logits[:, exit], labels) for exit in range(model.leaves)])
            (losses[int(way)] if way.isdigit() else losses.sum()).backward()
            gradients.append(
                [torch.cat([_gradient(p).flatten() for p in level.parameters()]) for level in model.levels]
            )
    rows = []
    for block in range(len(model.levels)):
        of = {way: float(torch.stack([g[block] for g in gs]).var(0).sum()) for way, gs in kept.items()}
        behind = [of[f"{exit}"] for exit in range(block, model.leaves)]
        alone = statistics.mean(behind)
        rows.append((f"{block + 1}", f"{len(behind)}", f"{of['sum'] / alone:.2f}", f"{of['equilibrium'] / alone:.2f}"))
    return table(("block", "exits behind it", "sum of the losses", "gradient equilibrium"), rows)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def draw(groups: list[Group], times: dict[str, list[float]], file: Path) -> None:
    """Accuracy against MACs and against measured time."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, label in zip(
        panels, ("million multiply-accumulates per image", "milliseconds for one image"), strict=True
    ):
        for group, marker in zip(groups, "*osD^vXPph<>" * 2, strict=False):
            x = [macs / 1e6 for macs in group.macs] if axes is panels[0] else times[group.name]
            axes.errorbar(
                x,
                group.mean("accuracy"),
                group.spread("accuracy"),
                marker=marker,
                ms=5,
                lw=1,
                capsize=2,
                label=group.name,
            )
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=8
    )
    figure.savefig(file, dpi=120)


def page(settings: Settings) -> str:
    """The results page with its pictures."""
    imta, aep, of_trees = finished(settings, IMTA), finished(settings, AEP), trees(settings)
    shown = [*imta.values(), *of_trees.values()]
    times = latencies(settings, [group.name for group in [*shown, *aep.values()]])
    draw(shown, times, RESULTS / "exits.png")
    ensembles = [dataclasses.replace(group, name=f"ensemble of exits, {group.name}") for group in aep.values()]
    if aep:
        draw(list(aep.values()), times, RESULTS / "exits_weights.png")
    costs = [
        (group.name, *(f"{millions(macs)} / {ms:.2f}" for macs, ms in zip(group.macs, times[group.name], strict=True)))
        for group in shown
    ]
    widest = max(len(row) - 1 for row in costs)
    costs = [(*row, *[""] * (widest + 1 - len(row))) for row in costs]
    seeds = {group.name: len(group.records) for group in [*shown, *aep.values()]}
    fewer = ", ".join(f"{name}: {count}" for name, count in seeds.items() if count < len(settings.seeds))
    fewer = f" ({fewer})" if fewer else ""
    return f"""# Multi-exit networks

[Multi-exit networks](../explanation/exits.md) of one backbone beside the [trees](paper.md) made of it: Fashion-MNIST,
`resnet8_cifar` with 24, 48 and 96 channels, {paper.FASHION_MNIST.train.epochs} epochs, AdamW, one recipe for all,
{len(settings.seeds)} seeds{fewer}. Cells: mean ± standard deviation over seeds. Early exits have convolutional heads.

![Accuracy against multiply-accumulates and against time](exits.png)

What a given cost is best spent on: of all networks and depths on this page, those that nothing cheaper reaches in mean
accuracy. Neighbours of the list are often within a standard deviation of each other.

{front([*shown, *ensembles])}

{comparison(shown)}

GE: gradient equilibrium. ISC: inline subnetwork collaboration. OFA: one-for-all distillation (gamma 0.9, T 3, after one
epoch of labels). Depths of a network with exits are its exits; those of a tree 1, 2, 4 and 8 networks. Its depth 0 is a
whole network, and its blocks are the same four. A tree with exits has three of them first, then its networks.

Multiply-accumulates per image, and milliseconds for one (one thread, medians of five rounds in turn):

{table(("", *(f"depth {depth}" for depth in range(widest))), costs)}

{claims(imta)}

## Exits on a tree

The same tree with three exits on the way to its first network, beside the exits without a tree and the tree without
exits: differences in points, paired by seed.

{on_a_tree(imta, of_trees)}

## Gradient equilibrium

The variance of each block's gradient over 40 batches of 32 images, before training, as a multiple of the mean variance
of the gradients that the single exits behind it send. IMTA argues that equilibrium bounds it: of a mean, at most 1.

{variances(settings)}

## Weighted ensembles of exits (AEP)

![Accuracy of weighted ensembles](exits_weights.png)

Trained on every exit's loss and the ensemble's. Accuracy of the ensembles of the first 1 to 4 exits:

{comparison(list(aep.values())) if aep else "not run."}

After `prune(tolerance={TOLERANCE}, batches)`, chosen on one half of the test images and judged on the other: exits with
a smaller share of the weights go, and all beyond the depth at which the ensemble answers best. Kept exits are those of
each seed; the last three columns say how much was saved.

{pruned(settings, aep)}

## How to repeat it

```bash
python benchmarks/paper.py --data-dir DIR --only table1 better   # the trees
python benchmarks/exits.py --data-dir DIR
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {os.cpu_count()} cores, one thread per run.
"""


def claims(groups: dict[str, Group]) -> str:
    """What the papers claim beside what was seen, paired by seed."""
    said = (
        ("GE helps multi-exit training (IMTA, section 4.2)", "exits, GE", BASE),
        ("ISC helps later exits (IMTA)", "exits, ISC", BASE),
        ("OFA helps early exits (IMTA)", "exits, OFA", BASE),
        ("all three together beat joint training (IMTA)", ALL, BASE),
    )
    rows = []
    for text, more, less in said:
        if more in groups and less in groups:
            found = paper.difference(groups[more], groups[less], "accuracy")
            rows.append((text, *(f"{gap:+.2f} ± {spread:.2f}" for gap, spread, _ in found)))
    if PLAIN in groups and BASE in groups:
        pairs = list(zip(groups[BASE].records, groups[PLAIN].records, strict=False))
        gaps = [a["accuracy"][-1] - b["accuracy"][-1] for a, b in pairs]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        text = "early exits cost the last one (MSDNet; IMTA's motive)"
        rows.append((text, "", "", "", f"{statistics.mean(gaps):+.2f} ± {spread:.2f}"))
    return table(("what the papers say: gain in points, seen here", *(f"exit {i}" for i in range(1, 5))), rows)


def front(groups: list[Group]) -> str:
    """The depths whose accuracy nothing cheaper reaches, in order of cost."""
    points = sorted(
        (macs, -accuracy, group.name, depth)
        for group in groups
        for depth, (macs, accuracy) in enumerate(zip(group.macs, group.mean("accuracy"), strict=True))
    )
    rows, best = [], 0.0
    for macs, accuracy, name, depth in points:
        if -accuracy > best:
            best = -accuracy
            rows.append((millions(macs), f"{best:.2f}", name, f"{depth}"))
    return table(("MACs", "accuracy (%)", "network", "depth"), rows)


def on_a_tree(imta: dict[str, Group], of_trees: dict[str, Group]) -> str:
    """What exits and networks give each other, where they share a trunk."""
    both, early, of_tree = of_trees.get(ON_TREE), EXITS["exits"] - 1, "tree, L_I + L_HD"
    if both is None:
        return "not run."
    beside = (
        (f"exits 1 to {early}, over {BASE}", imta.get(BASE), slice(0, early), slice(0, early)),
        (f"1, 2, 4, 8 networks, over {of_tree}", of_trees.get(of_tree), slice(early, None), slice(None)),
    )
    rows = []
    for text, other, mine, theirs in beside:
        pairs = zip(both.records, other.records, strict=False) if other else ()
        gaps = [[a - b for a, b in zip(p["accuracy"][mine], q["accuracy"][theirs], strict=True)] for p, q in pairs]
        cells = [f"{statistics.mean(of):+.2f}{_spread(of)}" for of in zip(*gaps, strict=True)]
        rows.append((text, *cells, *[""] * (4 - len(cells))))
    return table((ON_TREE, *[""] * 4), rows)


def _spread(values: tuple[float, ...]) -> str:
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
