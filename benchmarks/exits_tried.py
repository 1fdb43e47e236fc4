"""Compares ways to train exits that were tried, with short trainings on a third of CIFAR-100.

python benchmarks/exits_tried.py --data-dir DIR   trains the runs without a record, writes docs/results/exits_tried.md
python benchmarks/exits_tried.py --no-train       writes the page from the records

DIR contains the images as joined by `benchmarks/gpu.py join`. What is no option of hierens is implemented here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from comparison import recipes
from comparison.differences import difference
from comparison.records import ROOT, SHARES, machine, thresholds, write_json
from gpu_steps.batches import DeviceImages, loader
from gpu_steps.packing import Split, read_joined
from torch import Tensor

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group
from hierens.inference.calibration import collect
from hierens.training.config import Run
from hierens.training.run import train
from hierens.training.trainer import Trainer

RECORDS = ROOT / "docs" / "results" / "runs" / "exits_tried"
PAGE = ROOT / "docs" / "results" / "exits_tried.md"
IMAGES = 16_667
SEEDS = (0, 1, 2)
RECIPES = {
    "24-channels": {"channels": [24, 48, 96], "epochs": 5, "batch_size": 128},
    "16-channels": {"channels": [16, 32, 64], "epochs": 6, "batch_size": 64},
}
"""what differs from the recipe of benchmarks/exits.py, by the name of the recipe's folder"""


def detached(model: Any) -> None:
    """Early exits read the features without a gradient to them: only the last exit trains the blocks."""
    for exit in model.exits[:-1]:
        exit.register_forward_pre_hook(lambda _, values: tuple(value.detach() for value in values))


def sample_weighted(strength: float, leaf_logits: Tensor, images: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """sum_k mean_n w_nk l(z_nk, y_n): the images that would leave at exit k weigh most in its loss.

    As many images of the batch leave at every exit, the most confident first. They weigh 1 + strength, the others less,
    with a mean of 1. Simplified from L2W-DEN (arXiv 2209.08310), which learns the weights with a meta-network.
    """
    count, exits, _ = leaf_logits.shape
    confidence = leaf_logits.detach().softmax(2).amax(2)
    leaves = torch.full((count,), exits - 1)
    for exit in range(exits - 1):
        remaining = confidence[:, exit].masked_fill(leaves < exit, -1.0)
        leaves[remaining.topk(count // exits).indices] = exit
    weights = torch.where(leaves[:, None] == torch.arange(exits), 1 + strength, 1 - strength / (exits - 1))
    losses = F.cross_entropy(leaf_logits.flatten(0, 1), target.repeat_interleave(exits), reduction="none")
    return (weights * losses.view(count, exits)).mean(0).sum()


@dataclass(frozen=True)
class Row(recipes.Row):
    """A way to train exits.

    Attributes:
        change: changes a new model.
        loss: replaces the loss.
    """

    change: Callable[[Any], None] | None = None
    loss: Callable[..., Tensor] | None = None


_COMBINED = {
    "collaborate": True,
    "exit_weights": "uniform",
    "learn_weights": True,
    "objective": "independent+hierarchical",
}
ROWS = {
    "exits": Row("exits", {}),
    "boosted": Row("boosted", {"boosted": True}),
    "combined": Row("collaboration, learned ensembles", _COMBINED),
    "zero-time-waste": Row("collaboration, learned ensembles, detached features", _COMBINED, change=detached),
    "sample-weighted": Row("samples weighted", {}, loss=partial(sample_weighted, 0.5)),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str = ""
    """folder written by `benchmarks/gpu.py join`"""
    train: bool = True
    """--no-train writes the page from the existing records"""


def main(settings: Settings) -> None:
    """Train the runs without a record, then write the page."""
    torch.set_num_threads(1)
    images = read_joined(Path(settings.data_dir)) if settings.train else {}
    for seed, recipe, row in itertools.product(SEEDS, RECIPES, ROWS) if settings.train else ():
        file = RECORDS / recipe / row / f"{seed}.json"
        if not file.is_file():
            print(f"wrote {write_json(file, trained(recipe, ROWS[row], seed, images))}", flush=True)
    PAGE.write_text(page(read_records()))
    print(f"wrote {PAGE}")


def configured(recipe: str, row: Row, seed: int, output_dir: str) -> Run:
    """The recipe of benchmarks/exits.py, shortened, with the changes of a row."""
    run, short = recipes.RECIPES["cifar100"], RECIPES[recipe]
    network = {**run.model.backbone_args, "channels": short["channels"]}
    shortened = {"epochs": short["epochs"], "val_epochs": short["epochs"], "batch_size": short["batch_size"]}
    own = {"backbone_args": network, "checkpoint_steps": 10_000, "seed": seed, "output_dir": output_dir}
    return recipes.changed(run, recipes.ROWS["exits"].changes | shortened | own | row.changes)


def trained(recipe: str, row: Row, seed: int, images: Mapping[str, Split]) -> dict[str, Any]:
    """Train, and return the record."""
    whole, cpu = images["train"], torch.device("cpu")
    chosen = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))[:IMAGES].numpy()
    some = dataclasses.replace(whole, images=whole.images[chosen], labels=whole.labels[chosen])
    with tempfile.TemporaryDirectory() as folder:
        run = configured(recipe, row, seed, folder)
        training = loader(DeviceImages(some, run.data, cpu, seed, training=True), run.train.batch_size, True)
        test = loader(DeviceImages(images["test"], run.data, cpu), run.train.val_batch_size, False)
        model, result = train(run, (training, test), partial(_make_trainer, row))
    answers = collect(model, test)
    return {
        "title": row.title,
        "seed": seed,
        "accuracy": result["accuracy"],
        "nll": result["nll"],
        "macs": list(answers.macs),
        "budgeted": thresholds(answers),
        "machine": machine(),
    }


def _make_trainer(row: Row, model: Any, *rest: Any) -> Trainer:
    if row.change is not None:
        row.change(model)
    trainer = Trainer(model, *rest)
    if row.loss is not None:
        trainer.loss = row.loss  # type: ignore[assignment]
    return trainer


def read_records() -> dict[str, Group]:
    """The records by row. A run is identified by its recipe and its seed."""
    groups = {}
    for row in ROWS:
        records = []
        for file in sorted(RECORDS.glob(f"*/{row}/*.json")):
            record = json.loads(file.read_text())
            budgeted = record["budgeted"]["accuracy"]
            records.append(record | {"seed": f"{file.parts[-3]}/{file.stem}", "budgeted": budgeted})
        if records:
            groups[row] = Group(ROWS[row].title, records[0]["macs"], records)
    return groups


def page(groups: Mapping[str, Group]) -> str:
    """The results page."""
    return f"""# Ways to train exits that were tried

Three papers train exits differently from IMTA and AEP. Each way was built in its simplest form and compared with plain
exits that learn the labels. What does not gain is no option of hierens; its implementation is in
`benchmarks/exits_tried.py`.

- **Boosted** (BoostNet, Yu et al., AAAI 2023, [arXiv 2211.16726](https://arxiv.org/abs/2211.16726)): the logits of
  each exit are added to those of the exits before, without a gradient to these. This is the option `boosted`. Not
  included: the authors' halving of the earlier logits in training for budgets, and their scaling of gradients, which is
  `gradient_equilibrium`. In these runs, the classifiers of early exits started at random; the option starts them at
  zero, so that the last exit of a pretrained network does not change.
- **Collaboration, learned ensembles, detached features** (Zero Time Waste, Wolczyk et al., NeurIPS 2021,
  [arXiv 2106.05409](https://arxiv.org/abs/2106.05409)): the last exit alone trains the blocks, exits read the logits of
  the exit before, and a prediction is a weighted mean of the logits so far. Simplified: everything is trained in one
  stage, the weights are shared by all depths, and classes have no biases. Not an option.
- **Samples weighted** (simplified from L2W-DEN, Han et al., ECCV 2022,
  [arXiv 2209.08310](https://arxiv.org/abs/2209.08310)): in the loss of an exit, the images of the batch that would
  leave there weigh 1.5, the others 0.83. Equal shares leave at all exits, the most confident images first. The authors
  learn the weights with a meta-network. Not an option.

{_recipes(groups)}

## Accuracy of each exit

Differences from plain exits in points, paired by recipe and seed, with their standard errors. *runs*: pairs; of a
single pair, the error is unknown, and only a clear loss can be told.

{_differences(groups, "accuracy", [f"exit {exit + 1}" for exit in range(4)])}

The runs, in percent:

{_runs(groups)}

## Accuracy with a budget

The same differences for images that leave early, with thresholds calibrated on the other half of the test images.
Columns are budgets, from the cost of the first exit (0 %) to that of all (100 %).

{_differences(groups, "budgeted", [f"{100 * share:.0f} %" for share in SHARES])}

## How to repeat it

```bash
python benchmarks/exits_tried.py --data-dir DIR    # DIR: written by benchmarks/gpu.py join
```
"""


def _recipes(groups: Mapping[str, Group]) -> str:
    found = {record["seed"].split("/")[0] for group in groups.values() for record in group.records}
    described = [
        f"{short['channels'][0]} channels, {short['epochs']} epochs in batches of {short['batch_size']}"
        for name, short in RECIPES.items()
        if name in found
    ]
    return f"""The recipe is that of the [comparison on CIFAR-100](cifar100_exits.md), shortened: {IMAGES:,} of the
50,000 training images, and
{" or ".join(described)}.
These networks are far from trained to the end: the last of the plain exits is less accurate than the third, which has a
larger head. A gain here may be
smaller with the full recipe."""


def _differences(groups: Mapping[str, Group], which: str, columns: Sequence[str]) -> str:
    rows = []
    for name, group in groups.items():
        if name != "exits" and (found := difference(group, groups["exits"], which)):
            cells = (f"{dataclasses.replace(one, digits=2)}" for one in found)
            rows.append((group.name, *cells, f"{found[0].seeds}"))
    return table(("", *columns, "runs"), rows) if rows else "Not run yet."


def _runs(groups: Mapping[str, Group]) -> str:
    rows = [
        (group.name, record["seed"], *(f"{value:.2f}" for value in record["accuracy"]))
        for group in groups.values()
        for record in group.records
    ]
    return table(("", "recipe and seed", *(f"exit {exit + 1}" for exit in range(4))), rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
