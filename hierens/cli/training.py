"""`hierens train`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from hierens.cli.command import Command, Flag, UsageError
from hierens.cli.methods import check_made, check_method
from hierens.cli.output import machine_readable, print_table
from hierens.cli.results import results
from hierens.training.config import ModelConfig, Run
from hierens.training.presets import PRESETS, dump_run, load_run, preset


def train(arguments: Sequence[str], default: Run | None = None, description: str = "") -> Run | None:
    """Train, and print what every depth costs and gives.

    Args:
        arguments: flags; those that are no field of the configs are `--preset`, `--config`, `--print-config`, `--json`.
        default: the run that flags change, where no preset or file is named.
        description: above the list of flags.

    Returns:
        The run, unless there was nothing to train or another process speaks for all.

    Raises:
        ValueError: flags or a configuration that do not work.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset")
    peek.add_argument("--config")
    peek.add_argument("--print-config", action="store_true")
    peek.add_argument("--json", action="store_true")
    try:
        chosen, flags = peek.parse_known_args(arguments)
        run = TRAIN.parse(flags, _start(chosen.preset, chosen.config, default or Run()), description)
        _check_model_flags(run.model, TRAIN.given(flags))
    except (argparse.ArgumentError, ValueError) as error:
        raise UsageError(str(error)) from error

    if chosen.print_config:
        print(dump_run(run), end="")
        return None
    with machine_readable(chosen.json) as give:
        record = trained(run, quiet=chosen.json)
        if record is not None and chosen.json:
            give(record)
    return None if record is None else run


def _check_model_flags(config: ModelConfig, given: set[str]) -> None:
    """Refuse flags that the network asked for has no use for."""
    if config.start:
        check_made(given, config.start)
    check_method(given, config.method)
    if config.backbone.startswith("hne_"):  # an ensemble by itself
        check_made(given, config.backbone, ("blocks", "branching", "exits"))
    if config.branching and "blocks" in given:
        branching = " ".join(map(str, config.branching))
        raise UsageError(f"--branching {branching} says how many blocks there are: leave --blocks out.")


def _start(preset_name: str | None, file: str | None, default: Run) -> Run:
    if preset_name and file:
        raise UsageError("give --preset or --config, not both: a file may name its preset itself, as `preset: NAME`.")
    return load_run(file) if file else preset(preset_name) if preset_name else default


def trained(run: Run, quiet: bool = False) -> dict[str, Any] | None:
    """Train and print; the results, in the process that speaks for all."""
    from accelerate import PartialState

    from hierens.training.run import train as run_training

    began = time.perf_counter()
    model, record = run_training(run)
    if not PartialState().is_main_process:
        return None
    seconds, saved = time.perf_counter() - began, f"{run.train.output_dir}/model"
    if not quiet:
        print()
        print_table(*results(model, record))
        print(f"\ntrained in {seconds:.0f} s; model: {saved}")
    return {
        "model": saved,
        "seconds": round(seconds, 1),
        "macs": list(model.macs()),
        "networks": list(model.sizes),
        **record,
    }


TRAIN = Command(
    "train",
    "train an ensemble or a multi-exit network, by a recipe, a file and flags over it",
    Run,
    train,
    extra=(
        Flag("--preset", "NAME", f"a recipe to start from: {', '.join(PRESETS)}", choices=tuple(PRESETS)),
        Flag("--config", "FILE", "a YAML or JSON file to start from, as --print-config prints it"),
        Flag("--print-config", "", "print the configuration as YAML and do nothing else"),
        Flag("--json", "", "print the results as one JSON object"),
    ),
    often=(
        *("dataset", "data_dir", "input_size"),
        *("backbone", "pretrained", "method", "blocks", "exits"),
        *("output_dir", "epochs", "batch_size", "objective", "alpha", "optimizer", "lr", "weight_decay"),
        *("precision", "seed", "resume"),
    ),
    examples=("hierens train --preset finetune --data-dir DIR --backbone efficientnet_b0",),
)
