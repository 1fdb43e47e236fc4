"""Saves trained models as folders in the Hub's layout, also if their weights are sharded over processes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn

from hierens.core.atomic_files import saving
from hierens.hub.cards import COLUMNS
from hierens.hub.saving import WEIGHTS, save_config, save_pretrained
from hierens.models.adaptive import Adaptive
from hierens.models.loading import from_pretrained
from hierens.training.agreement import first_problem
from hierens.training.checkpoints.checkpoint import CheckpointWriteError
from hierens.training.checkpoints.files import collect_write_errors, free_space, recover
from hierens.training.checkpoints.selection import newest_checkpoint
from hierens.training.sharding import full_weights, is_sharded


def save_models(
    accelerator: Accelerator, models: Mapping[str, nn.Module], directory: Path, record: Mapping[str, Any]
) -> None:
    """Save the models of a run. Every process must call it.

    Args:
        accelerator: as for `save_model`.
        models: by the prefix of their results in the record; the folder of `ema_` is `model_ema`.
        directory: the run's.
        record: of the last validation.

    Raises:
        ValueError: a write error; the checkpoint has everything that is needed to save them again.
    """
    problems = []
    for prefix, model in models.items():
        results = {title: record[prefix + name] for name, title in COLUMNS.items()}
        try:
            save_model(accelerator, model, directory / f"model_{prefix}".rstrip("_"), results)
        except CheckpointWriteError as error:
            problems.append(str(error))
    if problems:
        newest = newest_checkpoint(directory)
        kept = f"all data needed are in {newest}: " if newest else ""
        raise ValueError(f"{' '.join(problems)} {kept}make room and start the same command again.")


def save_model(
    accelerator: Accelerator, model: nn.Module, directory: Path, results: Mapping[str, Sequence[float]]
) -> None:
    """`save_pretrained`, completely or not at all; of a network that is not timm's, the weights alone.

    Every process must call it.

    Args:
        accelerator: gathers weights that are sharded over processes.
        model: the ensemble, wrapped or not.
        directory: a model in it is replaced.
        results: columns of the card's table, a value per depth.

    Raises:
        CheckpointWriteError: a write error, such as a full disk.
    """
    sharded = is_sharded(model) or accelerator.distributed_type == DistributedType.DEEPSPEED
    weights = full_weights(model) if is_sharded(model) else accelerator.get_state_dict(model) if sharded else {}
    problems: list[str] = []
    if accelerator.is_main_process:
        with collect_write_errors() as problems:
            recover(directory.parent, directory.name)
            ensemble = accelerator.unwrap_model(model)
            if ensemble.arguments()["backbone"] is None:  # no config can rebuild it
                _save_weights(weights or ensemble.state_dict(), directory)
            else:
                save_pretrained(_gathered(ensemble, weights) if sharded else ensemble, directory, results)
    if problem := first_problem(problems):
        raise CheckpointWriteError(f"{directory} cannot be written ({problem}): {free_space(directory)}.")


def _save_weights(weights: Mapping[str, Tensor], directory: str | Path) -> None:
    with saving(directory) as partial:
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)


def _gathered(ensemble: Adaptive, weights: Mapping[str, Tensor]) -> Adaptive:
    """A sharded model with all its weights, on the CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        _save_weights(weights, scratch)
        save_config(ensemble, scratch)
        return from_pretrained(scratch)
