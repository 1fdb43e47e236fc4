"""Batch norm over the batch of all processes, on any device and with any executor.

torch's SyncBatchNorm replaces modules and needs a GPU. This module intercepts the function that every batch norm calls,
so modules, state dict and grouped execution do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as _FusedSyncBatchNorm
from torch.overrides import TorchFunctionMode


class SyncedBatchNorm(TorchFunctionMode):
    """In this context, batch statistics are those of the global batch. Every process must run the same layers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `F.batch_norm` where it would use batch statistics; call everything else unchanged."""
        kwargs = dict(kwargs or {})
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        given.update(zip(names, args, strict=False), **kwargs)
        if not given["training"]:
            return func(*args, **kwargs)
        return synced_batch_norm(**given)


class _Sum(torch.autograd.Function):  # torch.distributed.nn.functional.all_reduce is deprecated
    """The sum over processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def synced_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    training: bool = True,
) -> Tensor:
    """`F.batch_norm` for training, with mean and variance over all processes. (N, C, ...) -> (N, C, ...)."""
    if input.is_cuda:
        group, size = dist.group.WORLD, dist.get_world_size()
        return _FusedSyncBatchNorm.apply(input, weight, bias, running_mean, running_var, eps, momentum, group, size)
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    count = x.numel() // x.shape[1] * dist.get_world_size()  # processes hold equal shares of a batch
    mean = _Sum.apply(x.sum(dims)) / count
    centred = x - mean.view(shape)
    var = _Sum.apply(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var), momentum)
    y = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(input.dtype)
