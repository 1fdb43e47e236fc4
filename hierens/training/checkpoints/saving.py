"""The trained model as a folder in the Hub's layout, however its weights are spread over processes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn

from hierens.hub.saving import WEIGHTS, save_config, save_pretrained
from hierens.models.adaptive import Adaptive
from hierens.models.loading import from_pretrained
from hierens.training.checkpoints.checkpoint import CheckpointWriteError, first_problem
from hierens.training.checkpoints.files import free_space, noting_write_errors, recover
from hierens.training.sharding import full_weights, is_sharded


def save_model(
    accelerator: Accelerator, model: nn.Module, directory: Path, results: Mapping[str, Sequence[float]]
) -> None:
    """`save_pretrained`, whole or not at all. Every process must call it.

    Args:
        accelerator: gathers weights that are spread over processes.
        model: the ensemble, wrapped or not.
        directory: a model in it is replaced.
        results: columns of the card's table, a value per depth.

    Raises:
        CheckpointWriteError: the disk did not take it.
    """
    spread = is_sharded(model) or accelerator.distributed_type == DistributedType.DEEPSPEED
    weights = full_weights(model) if is_sharded(model) else accelerator.get_state_dict(model) if spread else {}
    problems: list[str] = []
    if accelerator.is_main_process:
        with noting_write_errors() as problems:
            recover(directory.parent, directory.name)
            ensemble = accelerator.unwrap_model(model)
            save_pretrained(_whole(ensemble, weights) if spread else ensemble, directory, results)
    if problem := first_problem(problems):
        raise CheckpointWriteError(f"{directory} cannot be written ({problem}): {free_space(directory)}.")


def _whole(ensemble: Adaptive, weights: Mapping[str, Tensor]) -> Adaptive:
    """A spread model in one piece, on the CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, Path(scratch) / WEIGHTS)
        save_config(ensemble, scratch)
        return from_pretrained(scratch)
