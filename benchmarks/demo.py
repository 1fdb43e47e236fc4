"""Runs the demo on several seeds, with and without co-distillation; writes docs/results/demo.md and demo.png.

python benchmarks/demo.py        finished runs in the folder --runs are not repeated
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

import timm
import torch
import tyro
from comparison.differences import Difference, difference

import hierens
from hierens.cli.demo import ARMS
from hierens.evaluation.plotting import plot_accuracy
from hierens.evaluation.profiling import millions, table
from hierens.evaluation.reporting import Group, read_runs
from hierens.training.data.loaders import create_datasets
from hierens.training.presets import PRESETS
from hierens.training.run import train

RESULTS = ROOT / "docs" / "results"
DEMO = PRESETS["demo"]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    seeds: int = 5
    """runs per objective"""
    threads: int = 2
    """CPU threads"""
    runs: Path = Path("runs/demo-seeds")
    """folder of the runs"""


def main(settings: Settings) -> None:
    """Train, then write the page and the figure."""
    torch.set_num_threads(settings.threads)
    places: dict[Path, str] = {}
    for seed in range(settings.seeds):
        for name, objective in ARMS.items():
            directory = settings.runs / f"{objective}-{seed}"
            config = dataclasses.replace(DEMO.train, seed=seed, objective=objective, output_dir=str(directory))
            model, record = train(dataclasses.replace(DEMO, train=config))
            places[directory] = name
            print(f"seed {seed}, {name}: {', '.join(f'{value:.2f}' for value in record['accuracy'])} %")
    groups = read_runs(list(places), list(places.values()))
    groups = [Group(g.name, g.macs, [{"seed": seed, **r} for seed, r in enumerate(g.records)]) for g in groups]
    title = f"photographs of clothes, mean of {settings.seeds} runs"
    plot_accuracy({group.name: (group.macs, group.mean("accuracy")) for group in groups}, RESULTS / "demo.png", title)
    (RESULTS / "demo.md").write_text(page(settings, model, groups))


def page(settings: Settings, model: hierens.HierarchicalEnsemble, groups: Sequence[Group]) -> str:
    """The results page."""
    learned, held_out = map(len, create_datasets(DEMO.data))
    distilled, labels_only = groups
    between = difference(distilled, labels_only)
    rows = [
        (
            f"{row.depth}",
            f"{row.leaves}",
            millions(row.macs),
            millions(row.parameters),
            *(f"{g.mean('accuracy')[row.depth]:.2f} ± {g.spread('accuracy')[row.depth]:.2f}" for g in groups),
            in_images(between[row.depth], held_out),
        )
        for row in model.profile().rows
    ]
    gains = [over_first(group) for group in groups]
    gained = [(f"{b}", *(in_images(gain[b], held_out) for gain in gains)) for b in range(1, len(between))]
    each = [
        (f"{record['seed']}", group.name, *(f"{value:.2f}" for value in record["accuracy"]))
        for pair in zip(*(group.records for group in groups), strict=True)
        for group, record in zip(groups, pair, strict=True)
    ]
    channels = ", ".join(map(str, model._model_args["backbone_args"]["channels"]))
    return f"""# The demo: photographs of clothes

The training of `make demo`, repeated on {settings.seeds} seeds: eight networks of `resnet8_cifar` with {channels}
channels, {DEMO.train.epochs} epochs on {learned:,} photographs of ten kinds of clothes at 32x32 pixels, tested on
{held_out:,} others. The photographs are in the public domain (CC0) and included in hierens (`--dataset clothing`).

Accuracy in percent, mean ± standard deviation over seeds. Differences are paired by seed and given with their standard
errors and, in parentheses, as a number of test images (one is {100 / held_out:.2f} %):

{table(("depth", "networks", "MACs", "parameters", *(g.name for g in groups), "difference"), rows)}

![Accuracy against multiply-accumulates](demo.png)

Gain over depth 0 of the same runs, with its standard error, paired by seed, and in test images:

{table(("depth", *(group.name for group in groups)), gained)}

{says(gains, between, groups)}

The setting was chosen in pilot runs on seeds 0 to 3 so that depth matters: narrow networks without augmentation
overfit, and an ensemble reduces this. With random crops and flips, the gain of eight networks over one was half as
large in a pilot run. Seeds change the weights and the order of the images, but not the test images, so the standard
errors do not cover other photographs. `hierens demo` prints the standard error over images, for one seed.

All runs:

{table(("seed", "objective", *(f"depth {depth}" for depth in range(len(between)))), each)}

```bash
python benchmarks/demo.py --seeds {settings.seeds} --threads {settings.threads}
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}.
"""


def over_first(group: Group) -> list[Difference]:
    """Per depth, the difference in accuracy from depth 0, paired by seed."""
    first = [{**record, "accuracy": record["accuracy"][:1] * len(group.macs)} for record in group.records]
    return difference(group, Group(group.name, group.macs, first))


def in_images(found: Difference, count: int) -> str:
    """Such as `+1.38 ± 0.79 (+26)`."""
    return f"{found} ({round(found.mean * count / 100):+d})"


def says(gains: Sequence[Sequence[Difference]], between: Sequence[Difference], groups: Sequence[Group]) -> str:
    """The differences that exceed twice their standard error, in words."""
    clear = [", ".join(f"{b}" for b in range(1, len(gain)) if gain[b].clear) or "none" for gain in gains]
    depths = "; ".join(f"{group.name}: depths {found}" for group, found in zip(groups, clear, strict=True))
    better = ", ".join(f"{b}" for b, found in enumerate(between) if found.clear and found.mean > 0) or "none"
    worse = ", ".join(f"{b}" for b, found in enumerate(between) if found.clear and found.mean < 0) or "none"
    return (
        f"More networks are better than one by more than twice the standard error at: {depths}.\n"
        f"Co-distillation is better than labels only by that much at depths: {better}; worse at: {worse}."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
