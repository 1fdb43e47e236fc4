"""Records: finished runs as small JSON files, from which pages are written without weights or data.

A record is at docs/results/runs/DATA/ROW/SEED.json. It contains the configuration, the results of every depth and of
calibrated thresholds on the test images, costs, training speed and the machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import hierens
from comparison.recipes import TEST_SPLITS, study
from hierens.core.predictions import PredictionWeights
from hierens.evaluation.metrics import LeafMetrics, as_record, evaluate_model
from hierens.evaluation.reporting import Group
from hierens.inference.calibration import CalibrationSet, budgeted_batch, collect
from hierens.inference.expectation import expectation
from hierens.models.tuning import _processor
from hierens.training.config import Run, to_json
from hierens.training.data.loaders import create_datasets

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "results" / "runs"
DEEP_ENSEMBLE = "deep-ensemble"
LOGITS = "logits.npy"
TOLERANCE = 0.1  # pruning removes exits with a smaller share of the weights
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)  # budgets, from the cost of the first depth (0) to full cost (1)


def record_file(data: str, row: str, seed: int) -> Path:
    """The path of a record."""
    return RECORDS / data / row / f"{seed}.json"


def write_record(run: Run, model: Any, data: str, row: str, images: Any) -> Path:
    """Evaluate a finished run, and write its record.

    Args:
        run: configuration of the run; its output folder contains `log.jsonl`.
        model: the trained network.
        data: name of the recipe.
        row: name of the row.
        images: the test set.
    """
    compared = study(data)
    model.to("cpu" if run.train.cpu else "cuda")
    answers = collect(model, DataLoader(images, 500))
    results = json.loads((Path(run.train.output_dir) / "results.json").read_text())
    lines = [json.loads(line) for line in (Path(run.train.output_dir) / "log.jsonl").read_text().splitlines()]
    rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
    record = {
        "title": compared.rows[row].title,
        "seed": run.train.seed,
        "test_images": len(answers.labels),
        **results,
        "parameters": list(model.parameter_counts()),
        "thresholds": {},
        "images_per_s": statistics.median(rates) if rates else None,
        "machine": machine() | ({} if run.train.cpu else {"device": torch.cuda.get_device_name()}),
        "config": _shared(run),
    }
    held_out = None
    if data in TEST_SPLITS:
        record["validation"] = {name: results[name] for name in ("accuracy", "nll", "val_loss")}
        record |= as_record(evaluate_model(model, DataLoader(images, 500)))
        held_out = collect(model, DataLoader(create_datasets(run.data)[1], 500))
    if model.depths > 1:
        record["thresholds"] = thresholds(answers, held_out)
    if getattr(model, "weighting", None) is not None:
        record["pruning"] = pruning(model, images)
    if row == compared.single:
        np.save(Path(run.train.output_dir) / LOGITS, answers.logits[:, 0].half().numpy())
    return write_json(record_file(data, row, run.train.seed), record)


def thresholds(answers: CalibrationSet, held_out: CalibrationSet | None = None) -> dict[str, list[float]]:
    """Mean MACs and accuracy (%) on test images with thresholds that were calibrated for budgets.

    Args:
        answers: predictions for the test images.
        held_out: predictions for the calibration set; by default, each half of the test images is the calibration set
            of the other half.
    """
    halves = [_part(answers, start) for start in (0, 1)]
    pairs = [(held_out, answers)] if held_out is not None else [(halves[0], halves[1]), (halves[1], halves[0])]
    curves = [[expectation(judged, policy) for policy in budgeted_batch(chosen, SHARES)] for chosen, judged in pairs]
    of_shares = list(zip(*curves, strict=True))
    return {
        "macs": [statistics.mean(one.macs.mean for one in both) for both in of_shares],
        "accuracy": [statistics.mean(one.accuracy.mean for one in both) for both in of_shares],
    }


def pruning(model: Any, images: Any) -> dict[str, Any]:
    """Result of pruning an ensemble of exits with one half of the test images, evaluated on the other half."""
    chosen, judged = (DataLoader(Subset(images, range(start, len(images), 2)), 500) for start in (0, 1))
    pruned = model.prune(TOLERANCE, chosen)
    costs = ("parameters", "macs")
    return {
        "weights": model.weights.tolist(),
        "kept": list(pruned.kept),
        "before": evaluate_model(model, judged).accuracy[-1],
        "after": evaluate_model(pruned.model, judged).accuracy[-1],
        "saved": {name: 1 - getattr(pruned.after, name) / getattr(pruned.before, name) for name in costs},
    }


def write_deep_ensemble(data: str, folder: Path, images: Any) -> Path | None:
    """Write the record of a deep ensemble if all of its networks have been trained.

    Each depth is an ensemble of one of the study's sizes; its results are means over disjoint groups of networks.

    Args:
        data: name of the recipe.
        folder: folder of the single networks' runs, by seed.
        images: the test set, for its labels.
    """
    compared = study(data)
    sizes, row = compared.sizes, compared.single
    files = [folder / f"{seed}" / LOGITS for seed in range(sizes[-1])]
    if not all(file.is_file() for file in files):
        return None
    logits = torch.stack([torch.from_numpy(np.load(file)).float() for file in files], 1)  # (N, networks, classes)
    labels = torch.tensor([images[index][1] for index in range(len(images))])
    by_size = {size: [_together(group, labels) for group in logits.split(size, 1)] for size in sizes}
    fields = by_size[1][0].keys()
    single = json.loads(record_file(data, row, 0).read_text())
    record = {
        "title": "deep ensemble",
        "seed": 0,
        "test_images": len(labels),
        "macs": [size * single["macs"][0] for size in sizes],
        "leaves": list(sizes),
        **{name: [statistics.mean(of[name] for of in by_size[size]) for size in sizes] for name in fields},
        "groups": {str(size): [of["accuracy"] for of in by_size[size]] for size in sizes},
        "parameters": [size * single["parameters"][0] for size in sizes],
        "machine": machine(),
        "config": single["config"],
    }
    return write_json(record_file(data, DEEP_ENSEMBLE, 0), record)


def read_records(data: str) -> dict[str, Group]:
    """The records of a data set by row, sorted by seed."""
    groups: dict[str, Group] = {}
    compared = study(data)
    for row in (*compared.rows, DEEP_ENSEMBLE):
        files = sorted((RECORDS / data / row).glob("*.json"), key=lambda file: int(file.stem))
        records = [json.loads(file.read_text()) for file in files]
        if records:
            title = compared.rows[row].title if row in compared.rows else records[0]["title"]
            groups[row] = Group(title, records[0]["macs"], records)
    return groups


def test_images(run: Run, data: str) -> Any:
    """The test set of a recipe, with the evaluation transform."""
    split = TEST_SPLITS.get(data, run.data.val_split)
    return create_datasets(dataclasses.replace(run.data, val_split=split))[1]


def machine() -> dict[str, Any]:
    """Processor and versions, on which the results depend in addition to the configuration."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "hierens": hierens.__version__,
    }


def _part(answers: CalibrationSet, start: int) -> CalibrationSet:
    """Every second image."""
    rows = slice(start, None, 2)
    return CalibrationSet(answers.logits[rows], answers.votes[rows], answers.labels[rows], answers.macs, answers.sizes)


def _together(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of the mean of some networks' logits, (N, networks, classes)."""
    metrics = LeafMetrics(PredictionWeights((logits.shape[1],)))
    metrics.update(logits, labels)
    return {name: values[-1] for name, values in as_record(metrics.compute()).items() if name != "leaf_accuracy"}


def _shared(run: Run) -> dict[str, Any]:
    """The configuration without paths."""
    config = to_json(run)
    config["data"]["data_dir"] = "DIR"
    config["train"]["output_dir"] = "DIR"
    if config["model"]["weights"]:
        config["model"]["weights"] = "FILE"
    if config["model"]["start"]:
        config["model"]["start"] = config["teacher"]["teacher"] = "DIR"
    return config


def write_json(file: Path, record: dict[str, Any]) -> Path:
    """Write a record atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    partial.replace(file)
    return file


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits, which halves the size of the files."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
