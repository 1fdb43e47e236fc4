"""`hierens train`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from hierens.cli.command import Command, Flag, UsageError
from hierens.cli.methods import check_made, check_method
from hierens.cli.output import json_output, print_table
from hierens.cli.results import results
from hierens.training.config import ModelConfig, Run
from hierens.training.presets import PRESETS, dump_run, load_run, preset


def train(arguments: Sequence[str], default: Run | None = None, description: str = "") -> Run | None:
    """Train, and print the costs and metrics of every depth.

    Args:
        arguments: flags: those of the configs' fields, and `--preset`, `--config`, `--print-config`, `--json`.
        default: the run that flags change, if no preset or file is given.
        description: text above the list of flags.

    Returns:
        The run; None if nothing was trained, and in processes other than the main one.

    Raises:
        ValueError: flags or a configuration are wrong.
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
    with json_output(chosen.json) as write_json:
        record = trained(run, quiet=chosen.json)
        if record is not None and chosen.json:
            write_json(record)
    return None if record is None else run


def _check_model_flags(config: ModelConfig, given: set[str]) -> None:
    """Refuse flags that have no meaning for the configured network."""
    if config.start:
        check_made(given, config.start)
    check_method(given, config.method)
    if config.backbone.startswith("hne_"):  # already an ensemble
        check_made(given, config.backbone, ("blocks", "branching", "members", "rank", "exits"))
    if config.branching and "blocks" in given:
        branching = " ".join(map(str, config.branching))
        raise UsageError(f"--branching {branching} sets the number of blocks: leave out --blocks.")


def _start(preset_name: str | None, file: str | None, default: Run) -> Run:
    if preset_name and file:
        raise UsageError("give --preset or --config, not both: a file can contain its preset, as `preset: NAME`.")
    return load_run(file) if file else preset(preset_name) if preset_name else default


def trained(run: Run, quiet: bool = False) -> dict[str, Any] | None:
    """Train and print the results; returns them in the main process, and None in others."""
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
    "train an ensemble or a multi-exit network, from a preset or a file, and flags",
    Run,
    train,
    extra=(
        Flag("--preset", "NAME", f"a configuration to start from: {', '.join(PRESETS)}", choices=tuple(PRESETS)),
        Flag("--config", "FILE", "a YAML or JSON file to start from, in the format of --print-config"),
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
