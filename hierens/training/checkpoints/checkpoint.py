"""Writes checkpoints and loads them.

A checkpoint is a folder `checkpoints/step-...`, sealed by a manifest of its files' sizes and digests; it receives its
name only when it is complete. `hierens.from_pretrained` reads it as well (except in DeepSpeed's layout). Weights are
safetensors. The optimiser's state has torch's format, which Accelerate reads with `weights_only`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn

from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import short
from hierens.hub.saving import WEIGHTS, save_config
from hierens.training.agreement import first_problem
from hierens.training.checkpoints.files import PARTIAL, collect_write_errors, free_space, publish, remove, seal
from hierens.training.checkpoints.resuming import (
    check_config,
    check_data,
    check_model,
    check_sharding,
    check_states,
    check_weights,
)
from hierens.training.checkpoints.selection import apply_policy, checkpoint_folder
from hierens.training.checkpoints.state import STATE, TrainState, read_state
from hierens.training.config import TrainConfig, to_json
from hierens.training.sharding import is_sharded, save_optimizer, save_weights
from hierens.training.sharding import load as load_sharded

_AVERAGE, _OPTIMIZER = "model_ema.safetensors", "optimizer_by_name.bin"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


def save_checkpoint(
    accelerator: Accelerator,
    config: TrainConfig,
    state: TrainState,
    data: Mapping[str, int] | None = None,
    average: nn.Module | None = None,
) -> Path:
    """Write a checkpoint and delete those that the policy does not keep. Every process must call it.

    Args:
        accelerator: holds the model, the optimiser and other registered objects.
        config: stored in the checkpoint; its `keep_checkpoints` and `keep_best` are the policy.
        state: how far the run has come.
        data: what the order of the data depends on, if anything: see `data_signature`.
        average: the model with averaged weights, if there is one.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointWriteError: a write error, such as a full disk, in every process; no partial files are left.
    """
    final = checkpoint_folder(config.output_dir, state.step)
    partial = final.with_suffix(PARTIAL)
    if accelerator.is_main_process:
        remove(partial)
    accelerator.wait_for_everyone()
    model = _model(accelerator)
    with collect_write_errors() as problems, _plain_weights(accelerator):
        if is_sharded(model):
            partial.mkdir(parents=True, exist_ok=True)
            save_weights(model, partial / WEIGHTS, accelerator.is_main_process)
            save_optimizer(
                model, accelerator._optimizers[0].optimizer, partial / _OPTIMIZER, accelerator.is_main_process
            )
        else:
            accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not problems:
        with collect_write_errors() as problems:
            content = {"state": asdict(state), "config": to_json(config), "data": dict(data or {})}
            (partial / STATE).write_text(json.dumps(content))
            save_config(model, partial)
            if average is not None:
                tensors = {name: tensor.cpu().contiguous() for name, tensor in average.state_dict().items()}
                save_file(tensors, partial / _AVERAGE)
            seal(partial)
            publish(partial, final)
    problem = first_problem(problems)
    if accelerator.is_main_process:
        if problem:
            remove(partial)
        else:
            apply_policy(config, state)
    accelerator.wait_for_everyone()
    if problem:
        raise CheckpointWriteError(f"{final} cannot be written ({problem}): {free_space(final.parent)}.")
    return final


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    config: TrainConfig,
    data: Mapping[str, int] | None = None,
    average: nn.Module | None = None,
) -> TrainState:
    """Load weights, optimiser and averages, and print which settings have changed.

    The number of processes may differ from before, unless the order of the data depends on it.

    Returns:
        How far the run had come.

    Raises:
        ValueError: the checkpoint is of another model, optimiser, or order of the data.
        LoadError: one of its files is damaged or has other contents.
    """
    state, before, data_before = read_state(folder / STATE)
    now = to_json(config)
    check_data(folder, data_before, dict(data or {}))
    check_config(folder, before, now, within_an_epoch=state.batch > 0)
    model = _model(accelerator)
    check_model(folder, model)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:  # it has its own layout
        check_weights(folder / WEIGHTS, model)
    if average is not None:
        check_weights(folder / _AVERAGE, average)
    check_sharding(folder, (folder / _OPTIMIZER).is_file(), is_sharded(model))
    check_states(folder, None if is_sharded(model) else accelerator._optimizers[0].optimizer)
    try:
        if is_sharded(model):
            load_sharded(model, accelerator._optimizers[0].optimizer, folder / WEIGHTS, folder / _OPTIMIZER)
        else:
            with _plain_weights(accelerator):
                accelerator.load_state(str(folder))
        if average is not None:
            average.load_state_dict(load_file(folder / _AVERAGE))
    except Exception as error:  # each library raises its own errors
        raise LoadError(f"{folder} does not fit this run: {short(first_line(error), plain=True)}") from error
    names = [name for name in now if now[name] != before.get(name) and name not in ("output_dir", "resume")]
    if names:
        changes = ", ".join(f"{name} {short(before.get(name))} -> {now[name]!r}" for name in names)
        accelerator.print(f"changed since {folder}: {changes}")
    return state


def _model(accelerator: Accelerator) -> Any:
    """The model without Accelerate's wrappers."""
    return accelerator.unwrap_model(accelerator._models[0])


@contextlib.contextmanager
def _plain_weights(accelerator: Accelerator) -> Iterator[None]:
    """Weights are saved and loaded by the model's own names, without the names that Accelerate's wrappers add."""

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models[: len(weights)]]

    def load(models: list[Any], directory: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    hooks = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
