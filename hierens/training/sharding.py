"""Weights, gradients and optimiser state sharded over processes by torch's FSDP2.

The whole tree is one FSDP unit: each process keeps its shard, and all weights are gathered for a step. This saves the
memory of optimiser state and gradients, not that of the weights in use. The branches' gathered weights are not adjacent
in memory, so levels are looped.

FSDP is requested by `accelerate config`, as usual. Accelerate's own wrapping, which divides models into units by its
policies and does nothing on CPUs, is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from hierens.training.config import TrainConfig

_REQUEST = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def fsdp_requested(config: TrainConfig) -> Iterator[bool]:
    """Whether FSDP is requested. The variable that requests it is hidden from Accelerate in this context.

    Raises:
        ValueError: the configuration cannot be combined with FSDP.
    """
    if not parse_flag_from_env(_REQUEST):
        yield False
        return
    if config.ema_decay is not None:
        raise ValueError("weights cannot be averaged with FSDP: leave out ema_decay, or train without FSDP.")
    if config.precision == "fp16":
        raise ValueError("FSDP is supported in full precision and bf16, not in fp16: choose precision bf16.")
    if config.clip_mode == "agc":
        raise ValueError("agc needs complete gradients, which FSDP shards: choose clip_mode norm or value.")
    value, os.environ[_REQUEST] = os.environ[_REQUEST], "false"
    try:
        yield True
    finally:
        os.environ[_REQUEST] = value  # for the next run in this process


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model's parameters over all processes, in place. Create optimisers afterwards: parameters are replaced.

    Raises:
        ValueError: there is a single process.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("FSDP needs several processes, and there is only one: train without FSDP.")
    model.to(device)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called."""
    return isinstance(model, FSDPModule)


def gather(model: nn.Module) -> None:
    """Gather all weights until the next step, so that processes may run the model different numbers of times."""
    if isinstance(model, FSDPModule):
        model.unshard()


def local_shard(parameter: Tensor) -> Tensor:
    """This process's shard of a parameter, or the parameter itself if it is not sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU for the main process, none for the others. Every process must call it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    return weights


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path, write: bool) -> None:
    """Write the optimiser's complete state in the process that has `write` set. Every process must call it."""
    state = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    if write:
        torch.save(state, file)


def save_weights(model: nn.Module, file: Path, write: bool) -> None:
    """Write all weights in the process that has `write` set. Every process must call it."""
    weights = full_weights(model)
    if write:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Path, state: Path) -> None:
    """Load the files of `save_weights` and `save_optimizer`, which any number of processes may have written."""
    set_model_state_dict(model, load_file(weights), options=_GATHERED)
    restored = torch.load(state, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, restored, options=_GATHERED)
