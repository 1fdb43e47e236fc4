"""The command line: `hierens train | eval | report`. Every field of a configuration is a flag."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import tyro
except ImportError:
    sys.exit("error: the command line needs tyro: pip install 'hierens[train]'.")

from hierens.adaptive import Adaptive
from hierens.errors import did_you_mean
from hierens.profiling import millions, table
from hierens.training.config import DataConfig

if TYPE_CHECKING:
    from hierens.training.run import Run

USAGE = """usage: hierens COMMAND ...

  train    train an ensemble: --preset paper-imagenet | paper-cifar | finetune | fashion-mnist | demo |
           demo-exits, or --config FILE
  eval     accuracy, likelihood, calibration and diversity of a saved model on a data set
  report   draw accuracy and diversity against MACs for finished runs

`hierens COMMAND --help` lists its flags."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends in one line and exit code 2."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if name not in COMMANDS:
            raise ValueError(
                f"there is no command {name!r}{did_you_mean(name, COMMANDS)}: choose {', '.join(COMMANDS)}."
            )
        COMMANDS[name](rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def train(arguments: Sequence[str], default: Run | None = None, description: str = "") -> Run | None:
    """Train, and print what every depth costs and gives.

    Args:
        arguments: flags; `--preset`, `--config` and `--print-config` come before the fields of the configs.
        default: the run that flags change, where no preset or file is named.
        description: above the list of flags.

    Returns:
        The run, unless there was nothing to train or another process speaks for all.
    """
    from hierens.training.presets import dump_run, load_run, preset
    from hierens.training.run import Run
    from hierens.training.run import train as run_training

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", help="a recipe to start from")
    peek.add_argument("--config", help="a YAML or JSON file to start from, as --print-config prints it")
    peek.add_argument("--print-config", action="store_true", help="print the configuration as YAML and do nothing else")
    chosen, flags = peek.parse_known_args(arguments)
    if chosen.preset and chosen.config:
        raise ValueError("give --preset or --config, not both: a file may name its preset itself, as `preset: NAME`.")
    start = load_run(chosen.config) if chosen.config else preset(chosen.preset) if chosen.preset else default or Run()
    about = f"{description or train.__doc__.splitlines()[0]}\n\n{peek.format_help()}"  # type: ignore[union-attr]
    run = tyro.cli(tyro.conf.OmitArgPrefixes[Run], args=flags, default=start, description=about, prog="hierens train")
    if chosen.print_config:
        print(dump_run(run), end="")
        return None
    began = time.perf_counter()
    model, record = run_training(run)
    if not _is_main():
        return None
    print(f"\n{results_table(model, record)}\n")
    print(f"trained in {time.perf_counter() - began:.0f} s; model: {run.train.output_dir}/model")
    return run


@dataclass(frozen=True)
class EvalSettings:
    """Which model, on which images; the defaults of the data are those that it was trained with, if they are known."""

    model: str
    """a folder of save_pretrained, or user/name on the Hub"""
    data: DataConfig = field(default_factory=DataConfig)
    """those of the validation split are used"""
    batch_size: int = 256
    """images at a time"""
    json: bool = False
    """print one JSON object instead of a table"""


def evaluate(arguments: Sequence[str]) -> None:
    """Print what every depth of a saved model gives on the validation split of a data set."""
    from torch.utils.data import DataLoader

    from hierens.hub import from_pretrained
    from hierens.metrics import as_record, evaluate_model
    from hierens.training.data import create_datasets
    from hierens.training.presets import load_run

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise ValueError("name the model first: hierens eval MODEL --dataset NAME --data-dir DIR.")
    name, *flags = arguments
    trained = Path(name).parent / "run.json"  # beside the model of a run
    start = EvalSettings(name, load_run(trained).data if trained.is_file() else DataConfig())
    if name in ("-h", "--help"):
        start, flags = EvalSettings("MODEL"), ["--help"]
    settings = tyro.cli(
        tyro.conf.OmitArgPrefixes[EvalSettings],
        args=flags,
        default=start,
        description=evaluate.__doc__,
        prog="hierens eval MODEL",
    )
    model = from_pretrained(settings.model)
    _, images = create_datasets(settings.data)
    loader = DataLoader(images, settings.batch_size, num_workers=settings.data.workers)
    record = as_record(evaluate_model(model, loader))
    print(json.dumps(record) if settings.json else results_table(model, record))


@dataclass(frozen=True)
class ReportSettings:
    """Draw accuracy and diversity against MACs for finished runs, and accuracy network by network."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """output directories of runs; those that differ in their seed alone are averaged"""
    names: tuple[str, ...] = ()
    """what to call each run; by default the fields in which they differ"""
    output: str = "report"
    """folder for report.md, accuracy.png and leaves.png"""


def report(arguments: Sequence[str]) -> None:
    """Write a page and the paper's pictures from what runs left."""
    from hierens.reporting import comparison, read_runs, write_report

    settings = tyro.cli(ReportSettings, args=list(arguments), prog="hierens report")
    if not settings.runs:
        raise ValueError("name the output directories of finished runs: hierens report RUN...")
    groups = read_runs(settings.runs, settings.names)
    print(f"accuracy (%) by networks evaluated\n\n{comparison(groups)}\n")
    print(f"wrote {write_report(groups, settings.output)}")


def results_table(model: Adaptive, record: Mapping[str, Any]) -> str:
    """What every depth costs and gives."""
    profile = model.profile()
    rows = [
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
    return table(("depth", profile.unit, "MACs", "parameters", "latency (ms)", "accuracy (%)", "NLL", "ECE"), rows)


def _is_main() -> bool:
    """Whether this process speaks for all."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {"train": train, "eval": evaluate, "report": report}


if __name__ == "__main__":
    main()
