"""Weights, gradients and optimiser state spread over processes, by torch's FSDP2.

The whole tree is one unit: each process keeps its share, and for a step all weights are put together. So this saves the
memory of optimiser state and gradients, not that of the weights in use. Put together, weights no longer lie branch by
branch, so that levels are looped.

Asked for as everywhere: by `accelerate config`. Accelerate's own wrapping, which cuts models into units by its
policies, and which does nothing on CPUs, is put aside.
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
def taken_over(config: TrainConfig) -> Iterator[bool]:
    """Whether FSDP was asked for; inside, Accelerate, which reads the same variable, does not know of it.

    Raises:
        ValueError: what the configuration asks for cannot be had with FSDP.
    """
    if not parse_flag_from_env(_REQUEST):
        yield False
        return
    if config.ema_decay is not None:
        raise ValueError("FSDP keeps no average of the weights: leave ema_decay out, or train without FSDP.")
    if config.precision == "fp16":
        raise ValueError("FSDP is supported in full precision and bf16, not in fp16: choose precision bf16.")
    if config.clip_mode == "agc":
        raise ValueError("agc needs whole gradients, which FSDP spreads: choose clip_mode norm or value.")
    asked, os.environ[_REQUEST] = os.environ[_REQUEST], "false"
    try:
        yield True
    finally:
        os.environ[_REQUEST] = asked  # for the next run in this process


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a model's parameters over all processes, in place. Parameters become new objects: optimisers come after.

    Raises:
        ValueError: there is a single process.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("FSDP spreads a model over several processes, and there is one: train without FSDP.")
    model.to(device)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called."""
    return isinstance(model, FSDPModule)


def gather(model: nn.Module) -> None:
    """Put all weights together until the next step, so that processes need not run the model equally often."""
    if isinstance(model, FSDPModule):
        model.unshard()


def own_part(parameter: Tensor) -> Tensor:
    """What this process keeps of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, for the main process; the others get none. Every process must call it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    return weights


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path, write: bool) -> None:
    """Write the whole optimiser's state, by the process that is told to. Every process must call it."""
    state = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    if write:
        torch.save(state, file)


def save_weights(model: nn.Module, file: Path, write: bool) -> None:
    """Write all weights, by the process that is told to. Every process must call it."""
    weights = full_weights(model)
    if write:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Path, state: Path) -> None:
    """Put back what `save_weights` and `save_optimizer` wrote, whatever the number of processes was."""
    set_model_state_dict(model, load_file(weights), options=_GATHERED)
    restored = torch.load(state, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, restored, options=_GATHERED)
