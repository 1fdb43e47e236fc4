"""`hierens eval` and `hierens report`: results of models and runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from hierens.cli.command import Command, UsageError
from hierens.cli.output import json_output, print_table
from hierens.core.progress import with_progress
from hierens.training.config import DataConfig
from hierens.training.presets import load_run

if TYPE_CHECKING:
    from hierens.evaluation.reporting import Group
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
    settings = parse_with_data(EVAL, arguments)

    from hierens.evaluation.metrics import as_record, evaluate_model
    from hierens.models.loading import from_pretrained

    with json_output(settings.json) as write_json:
        model = from_pretrained(settings.model)
        record = as_record(evaluate_model(model, held_out_batches(model, settings, EVAL.given(arguments))))
        if settings.json:
            write_json(record)
        else:
            print_table(*results(model, record))


def parse_with_data(command: Command, arguments: Sequence[str]) -> Any:
    """The settings of a command on a model and data; by default the data that the model was trained with."""
    name, *flags = [*arguments] or [""]
    if name in ("-h", "--help", "--help-all"):
        command.parse(arguments)
    if not name or name.startswith("-"):
        raise UsageError(f"give the model first: hierens {command.name} MODEL --dataset NAME --data-dir DIR.")
    return command.parse(flags, command.settings(name, data=_trained_on(Path(name))))


def held_out_batches(model: Adaptive, settings: Any, given: Collection[str]) -> Iterator[Any]:
    """Images and labels of the validation split, prepared as for the model, with a progress bar.

    Args:
        model: whose classes number the labels.
        settings: its `model`, `data` and `batch_size` are read.
        given: names of the fields that were given as flags; they replace the model's preprocessing.
    """
    from torch.utils.data import DataLoader

    from hierens.core.labels import label_names
    from hierens.training.data.loaders import create_held_out
    from hierens.training.preprocessing import PREPARED, data_config

    own = data_config(model, settings.model)
    prepared = {name: getattr(own, name) for name in PREPARED if name not in given}
    data = dataclasses.replace(settings.data, **prepared)
    images = create_held_out(data, label_names(model) or model.num_classes)
    loader = DataLoader(images, settings.batch_size, num_workers=data.workers)
    return with_progress(loader, len(loader) if isinstance(images, Sized) else None, "evaluating")


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
    """Draw accuracy and diversity over cost for finished runs, and accuracy network by network."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """output directories of runs; runs that differ only in the seed are averaged"""
    names: tuple[str, ...] = ()
    """names of the runs; by default the fields in which they differ"""
    cost: Literal["macs", "milliseconds"] = "macs"
    """x axis: multiply-accumulates, or the time of one image, measured on this machine with the saved models"""
    output: str = "report"
    """folder for report.md, accuracy.png, diversity.png and leaves.png"""
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
        if settings.cost == "milliseconds":
            groups = [dataclasses.replace(g, milliseconds=_milliseconds(g)) for g in groups]
        files = [str(file) for file in write_report(groups, settings.output, settings.cost)]
        if settings.json:
            fields = ("name", "macs", "milliseconds", "records")
            found = [{**{f: getattr(g, f) for f in fields}, "seeds": len(g.records)} for g in groups]
            write_json({"page": files[0], "files": files, "runs": found})
        else:
            print(f"accuracy (%) by networks evaluated\n\n{comparison(groups)}\n")
            print("\n".join(f"wrote {file}" for file in files))


def _milliseconds(group: Group) -> list[float]:
    """The time of every depth for one image, measured with the model of the group's first run."""
    from hierens.models.loading import from_pretrained

    return [row.latency_ms for row in from_pretrained(Path(group.directory) / "model").profile().rows]


REPORT = Command(
    "report",
    "draw accuracy and diversity of finished runs over MACs or milliseconds",
    ReportSettings,
    report,
    "RUN...",
    examples=("hierens report runs/a runs/b --names small large", "hierens report runs/* --cost milliseconds"),
)
