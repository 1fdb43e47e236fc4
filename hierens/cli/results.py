"""`hierens eval` and `hierens report`: results of models and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.output import json_output, print_table
from hierens.core.progress import with_progress
from hierens.training.config import DataConfig
from hierens.training.presets import load_run

if TYPE_CHECKING:
    from hierens.models.adaptive import Adaptive


@dataclass(frozen=True)
class EvalSettings:
    """The model and the data; by default the data that it was trained with, if they are known."""

    model: tyro.conf.Positional[str]
    """folder of a saved model, or user/name on the Hub"""
    data: DataConfig = field(default_factory=DataConfig)
    """the data set, whose validation split is used"""
    batch_size: int = 256
    """images per batch"""
    json: bool = False
    """print one JSON object instead of a table"""


def evaluate(arguments: Sequence[str]) -> None:
    """Print the metrics of every depth of a saved model on the validation split of a data set."""
    name, *flags = [*arguments] or [""]
    if name in ("-h", "--help", "--help-all"):
        EVAL.parse(arguments)
    if not name or name.startswith("-"):
        raise UsageError("give the model first: hierens eval MODEL --dataset NAME --data-dir DIR.")
    start = EvalSettings(name, _trained_on(Path(name)))
    settings = EVAL.parse(flags, start)

    from torch.utils.data import DataLoader

    from hierens.core.labels import label_names
    from hierens.evaluation.metrics import as_record, evaluate_model
    from hierens.models.loading import from_pretrained
    from hierens.training.data.loaders import create_held_out

    with json_output(settings.json) as write_json:
        model = from_pretrained(settings.model)
        images = create_held_out(settings.data, label_names(model) or model.num_classes)
        loader = DataLoader(images, settings.batch_size, num_workers=settings.data.workers)
        total = len(loader) if isinstance(images, Sized) else None
        record = as_record(evaluate_model(model, with_progress(loader, total, "evaluating")))
        if settings.json:
            write_json(record)
        else:
            print_table(*results(model, record))


def _trained_on(model: Path) -> DataConfig:
    """The data in the `run.json` beside the model of a run, if there is one."""
    trained = model.parent / "run.json"
    return load_run(trained).data if trained.is_file() else DataConfig()


def results_table(model: Adaptive, record: Mapping[str, Any]) -> str:
    """The table of every depth's costs and metrics."""
    from hierens.evaluation.profiling import table

    return table(*results(model, record))


def results(model: Adaptive, record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of depths."""
    from hierens.evaluation.profiling import millions

    profile = model.profile()
    rows: list[tuple[str, ...]] = [
        (
            f"{row.depth}",
            f"{row.leaves}",
            millions(row.macs),
            millions(row.parameters),
            f"{row.latency_ms:.2f}",
            f"{record['accuracy'][row.depth]:.2f}",
            f"{record['nll'][row.depth]:.3f}",
            f"{record['ece'][row.depth]:.3f}",
        )
        for row in profile.rows
    ]
    return ("depth", profile.unit, "MACs", "parameters", "latency (ms)", "accuracy (%)", "NLL", "ECE"), rows


EVAL = Command(
    "eval",
    "accuracy, likelihood and calibration of every depth of a saved model on a data set",
    EvalSettings,
    evaluate,
    "MODEL",
    often=(
        *("MODEL", "dataset", "data_dir", "val_split", "input_size", "mean", "std", "crop_pct", "interpolation"),
        *("workers", "batch_size", "json"),
    ),
    examples=("hierens eval runs/demo/model", "hierens eval user/name --data-dir DIR --json"),
)


@dataclass(frozen=True)
class ReportSettings:
    """Draw accuracy and diversity against MACs for finished runs, and accuracy network by network."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """output directories of runs; runs that differ only in the seed are averaged"""
    names: tuple[str, ...] = ()
    """names of the runs; by default the fields in which they differ"""
    output: str = "report"
    """folder for report.md, accuracy.png and leaves.png"""
    json: bool = False
    """print one JSON object instead of a table"""


def report(arguments: Sequence[str]) -> None:
    """Write a page with the paper's pictures for finished runs."""
    settings = REPORT.parse(arguments)
    if not settings.runs:
        raise UsageError("give the output directories of finished runs: hierens report RUN...")

    from hierens.evaluation.reporting import comparison, read_runs, write_report

    with json_output(settings.json) as write_json:
        groups = read_runs(settings.runs, settings.names)
        page = write_report(groups, settings.output)
        if settings.json:
            found = [{"name": g.name, "macs": g.macs, "seeds": len(g.records), "records": g.records} for g in groups]
            write_json({"page": str(page), "runs": found})
        else:
            print(f"accuracy (%) by networks evaluated\n\n{comparison(groups)}\n")
            print(f"wrote {page}")


REPORT = Command(
    "report",
    "draw accuracy and diversity of finished runs against MACs",
    ReportSettings,
    report,
    "RUN...",
    examples=("hierens report runs/a runs/b --names small large",),
)
