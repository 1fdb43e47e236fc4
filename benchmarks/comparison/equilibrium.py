"""Variance of the gradients of a multi-exit network, with and without gradient equilibrium."""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from comparison.recipes import configured
from comparison.records import RECORDS
from hierens.training.data.loaders import count_classes, create_datasets
from hierens.training.run import create_ensemble


def write_variances(data: str, data_dir: str, batches: int = 40) -> None:
    """Measure the variance of every block's gradient over batches, before training, unless the file exists."""
    file = RECORDS / data / "variances.json"
    if not file.is_file():
        rows = variances(data, data_dir, batches)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")


def read_variances(data: str) -> list[dict[str, Any]]:
    """The variances written by `write_variances`; empty if there are none."""
    file = RECORDS / data / "variances.json"
    return list(json.loads(file.read_text())) if file.is_file() else []


def variances(data: str, data_dir: str, batches: int) -> list[dict[str, Any]]:
    """Per block, the variance as a multiple of the mean variance of the gradients from single exits behind it."""
    run = configured(data, "exits", 0, data_dir, "")
    train_set, _ = create_datasets(run.data)
    model = create_ensemble(run, count_classes(train_set)).train()
    loader = iter(DataLoader(train_set, 32, shuffle=True, generator=torch.Generator().manual_seed(0)))
    ways = ("sum", "equilibrium", *map(str, range(model.leaves)))
    kept: dict[str, list[list[Tensor]]] = {way: [] for way in ways}
    for images, labels in (next(loader) for _ in range(batches)):
        for way, gradients in kept.items():
            model.gradient_equilibrium = way == "equilibrium"
            model.zero_grad()
            logits = model(images, reduce=False)
            losses = torch.stack([cross_entropy(logits[:, exit], labels) for exit in range(model.leaves)])
            (losses[int(way)] if way.isdigit() else losses.sum()).backward()
            gradients.append([_gradient(level) for level in model.levels])
    rows = []
    for block in range(len(model.levels)):
        of = {way: float(torch.stack([g[block] for g in gradients]).var(0).sum()) for way, gradients in kept.items()}
        behind = [of[str(exit)] for exit in range(block, model.leaves)]
        alone = statistics.mean(behind)
        rows.append(
            {
                "block": block + 1,
                "exits": len(behind),
                "sum": of["sum"] / alone,
                "equilibrium": of["equilibrium"] / alone,
            }
        )
    return rows


def _gradient(block: Any) -> Tensor:
    """All gradients of a block as one vector, with zeros for missing gradients."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in block.parameters()]
    return torch.cat([part.flatten() for part in parts])
