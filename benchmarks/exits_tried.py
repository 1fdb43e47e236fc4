"""Measures ways to train exits that are candidates for hierens, on a third of CIFAR-100 for a third of the epochs.

python benchmarks/exits_tried.py --data-dir DIR   trains the runs without a record, writes docs/results/exits_tried.md
python benchmarks/exits_tried.py --no-train       writes the page from the records

DIR contains the images as joined by `benchmarks/gpu.py join`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from comparison.recipes import RECIPES
from comparison.records import ROOT, SHARES, machine, thresholds, write_json
from gpu_steps.batches import DeviceImages, loader
from gpu_steps.packing import Split, read_joined
from torch import Tensor, nn

from hierens.inference.calibration import collect
from hierens.training.config import ModelConfig, Run
from hierens.training.run import train
from hierens.training.trainer import Trainer

RECORDS = ROOT / "docs" / "results" / "runs" / "exits_tried"
PAGE = ROOT / "docs" / "results" / "exits_tried.md"
IMAGES = 16_667
CHANNELS = [16, 32, 64]
# Small batches, so that the last exit is trained long enough to be the best one.
SHORTENED = {"epochs": 6, "val_epochs": 6, "batch_size": 64, "checkpoint_steps": 10_000}


class Previous(nn.Module):
    """The logits of the exit before, times a factor, in place of an embedding: boosting (arXiv 2211.16726)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits.detach()


def boosted(factor: float, model: Any) -> None:
    """Each exit adds its logits to those of the exit before; a step changes only its own."""
    model.embeddings = nn.ModuleList(Previous(factor) for _ in model.exits[1:])


def detached(model: Any) -> None:
    """Early exits read the features without a gradient to them: only the last exit trains the blocks."""
    for exit in model.exits[:-1]:
        exit.register_forward_pre_hook(lambda _, values: tuple(value.detach() for value in values))


def sample_weighted(strength: float, leaf_logits: Tensor, _: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """sum_k mean_n w_nk l(z_nk, y_n): the images that would leave at exit k weigh most in its loss.

    As many images of the batch leave at every exit, the most confident first. They weigh 1 + strength, the others less,
    with a mean of 1. Simplified from L2W-DEN (arXiv 2209.08310), which learns the weights with a meta-network.
    """
    count, exits, classes = leaf_logits.shape
    confidence = leaf_logits.detach().softmax(2).amax(2)
    leaves = torch.full((count,), exits - 1)
    for exit in range(exits - 1):
        remaining = confidence[:, exit].masked_fill(leaves < exit, -1.0)
        leaves[remaining.topk(count // exits).indices] = exit
    weights = torch.where(leaves[:, None] == torch.arange(exits), 1 + strength, 1 - strength / (exits - 1))
    losses = F.cross_entropy(leaf_logits.flatten(0, 1), target.repeat_interleave(exits), reduction="none")
    return (weights * losses.view(count, exits)).mean(0).sum()


@dataclass(frozen=True)
class Row:
    """A way to train exits: fields of the configuration, a change of the model, and another loss."""

    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    loss: Callable[..., Tensor] | None = None


_ENSEMBLE = {
    "collaborate": True,
    "exit_weights": "uniform",
    "learn_weights": True,
    "objective": "independent+hierarchical",
}
ROWS = {
    "exits": Row("exits"),
    "boosted": Row("boosted", change=partial(boosted, 1.0)),
    "boosted-half": Row("boosted, previous logits halved", change=partial(boosted, 0.5)),
    "detached": Row("exits read detached features", change=detached),
    "sample-weighted": Row("samples weighted", loss=partial(sample_weighted, 0.5)),
    "cascade": Row("collaboration and ensembles", _ENSEMBLE),
    "zero-time-waste": Row("collaboration and ensembles, detached features", _ENSEMBLE, detached),
    "boosted-equilibrium": Row(
        "boosted, previous logits halved, equilibrium", {"gradient_equilibrium": True}, partial(boosted, 0.5)
    ),
}


def configured(row: Row, seed: int, output_dir: str) -> Run:
    """The recipe of benchmarks/exits.py, shortened, with the changes of a row."""
    run = RECIPES["cifar100"]
    of_model = {f.name for f in dataclasses.fields(ModelConfig)} & row.changes.keys()
    network = {**run.model.backbone_args, "channels": CHANNELS}
    model = {"method": "multi_exit", "exits": 4, "head": "conv", "backbone_args": network}
    model |= {key: row.changes[key] for key in of_model}
    training = {"objective": "independent", **SHORTENED}
    training |= {key: value for key, value in row.changes.items() if key not in of_model}
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **model),
        train=dataclasses.replace(run.train, **training, seed=seed, output_dir=output_dir),
    )


def trained(row: Row, seed: int, images: dict[str, Split]) -> dict[str, Any]:
    """Train, and return the record."""
    chosen = torch.randperm(len(images["train"].labels), generator=torch.Generator().manual_seed(0))[:IMAGES].numpy()
    some = dataclasses.replace(
        images["train"], images=images["train"].images[chosen], labels=images["train"].labels[chosen]
    )
    with tempfile.TemporaryDirectory() as folder:
        run, cpu = configured(row, seed, folder), torch.device("cpu")
        loaders = (
            loader(DeviceImages(some, run.data, cpu, seed, training=True), run.train.batch_size, True),
            loader(DeviceImages(images["test"], run.data, cpu), run.train.val_batch_size, False),
        )
        model, result = train(run, loaders, partial(_make_trainer, row))
    answers = collect(model, loaders[1])
    kept = {name: result[name] for name in ("accuracy", "nll")}
    weights = getattr(model, "weights", None)
    return {
        "title": row.title,
        "seed": seed,
        **kept,
        "macs": list(answers.macs),
        "budgeted": thresholds(answers),
        "weights": None if weights is None else weights.tolist(),
        "machine": machine(),
    }


def _make_trainer(row: Row, model: Any, *rest: Any) -> Trainer:
    if row.change is not None:
        row.change(model)
    trainer = Trainer(model, *rest)
    if row.loss is not None:
        trainer.loss.__class__ = type("Loss", (type(trainer.loss),), {"__call__": staticmethod(row.loss)})
    return trainer
