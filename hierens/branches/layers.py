"""Layers that run w branches at once, with packed weights.

The feature maps of the branches are in one of two forms. Side by side in channels, (N, w*C, ...), is the paper's form
(section 3.1, figure 2): a convolution has w times the groups. One after another in the batch, (w*N, ...), is for
per-sample operations: linear layers on tokens become batched matrix products, and layers without weights run unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    GroupNormAct,
    LayerNormAct,
    LayerNormAct2d,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
)
from timm.layers.drop import drop_path
from timm.layers.padding import pad_same
from timm.layers.std_conv import StdConv2dSame
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hierens.branches.tensors import BranchSlice, Layer


def to_batch(value: Any, width: BranchSlice) -> Any:
    """Convert branches from channels (N, w*C, ...) to batch (w*N, C, ...); tuples tensor by tensor."""
    return tree_map_only(Tensor, lambda x: x.unflatten(1, (width.active, -1)).transpose(0, 1).flatten(0, 1), value)


def to_channels(value: Any, width: BranchSlice) -> Any:
    """Convert branches from batch (w*N, C, ...) to channels (N, w*C, ...); tuples tensor by tensor."""
    return tree_map_only(Tensor, lambda x: x.unflatten(0, (width.active, -1)).transpose(0, 1).flatten(1, 2), value)


def to_siblings(value: Any, width: BranchSlice) -> Any:
    """Repeat one input per parent (N, parents*C, ...) for each branch (N, w*C, ...); tuples tensor by tensor."""
    if width.siblings == 1:
        return value

    def repeated(x: Tensor) -> Tensor:
        parents = x.unflatten(1, (width.parents, 1, -1))
        return parents.expand(-1, -1, width.siblings, *parents.shape[3:]).flatten(1, 3)

    return tree_map_only(Tensor, repeated, value)


def shape_of_parents(x: Tensor, width: BranchSlice) -> torch.Size:
    """The shape (w*N, C, ...) in batch form of a tensor with one input per parent."""
    batch, channels, *rest = x.shape
    return torch.Size((batch * width.active, channels // width.parents, *rest))


def shape_in_batch(x: Tensor, width: BranchSlice) -> torch.Size:
    """The shape (w*N, C, ...) in batch form of a tensor with branches side by side."""
    batch, channels, *rest = x.shape
    return torch.Size((batch * width.active, channels // width.active, *rest))


def shape_of_one(weights: Tensor, width: BranchSlice) -> torch.Size:
    """The shape of weights (w, ...) in a single branch."""
    return weights.shape[1:]


# --- layers on branches side by side in channels ----------------------------------------------------------------------

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)  # TensorFlow's padding, computed from the input's size
STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def convolution(layer: Layer, x: Tensor, width: BranchSlice, shared: bool = False) -> Tensor:
    """Any convolution of w branches, as w times the groups; `shared`: of siblings' inputs, as more output channels."""
    module, weight, bias = layer.module, layer.rows("weight", width), layer.rows("bias", width)
    if isinstance(module, STANDARDISED):
        weight = standardised(module, weight, layer.rows("gain", width) if hasattr(module, "gain") else None)
    padding = module.padding
    if isinstance(module, SAME) and getattr(module, "same_pad", True):
        x, padding = pad_same(x, module.kernel_size, module.stride, module.dilation), 0
    run = _CONVOLUTIONS[weight.ndim - 2]
    groups = module.groups * (width.parents if shared else width.active)
    return run(x, weight, bias, module.stride, padding, module.dilation, groups)


def standardised(module: Any, weight: Tensor, gain: Tensor | None) -> Tensor:
    """Standardised weights; computed per output channel, so branches are additional output channels."""
    if gain is not None:
        gain = (gain * module.scale).view(-1)
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, gain, None, True, 0.0, module.eps).reshape_as(weight)


def batch_norm(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Batch norm of w branches: w times the channels; the running statistics are updated in place."""
    module = layer.module
    tracked = module.training and module.track_running_stats
    if tracked and module.num_batches_tracked is not None:
        layer.rows("num_batches_tracked", width).add_(1)
    use_statistics = tracked or not module.training
    x = F.batch_norm(
        x,
        layer.rows("running_mean", width) if use_statistics else None,
        layer.rows("running_var", width) if use_statistics else None,
        layer.rows("weight", width),
        layer.rows("bias", width),
        module.training or module.running_mean is None,
        module.momentum or 0.0,
        module.eps,
    )
    return _then_act(module, x)


def group_norm(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Group norm of w branches: w times the groups."""
    module = layer.module
    groups = module.num_groups * width.active
    x = F.group_norm(x, groups, layer.rows("weight", width), layer.rows("bias", width), module.eps)
    return _then_act(module, x)


def channel_layer_norm(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Layer norm over the channels (N, w*C, H, W) of each branch, at every position."""
    module = layer.module
    rows = x.unflatten(1, (width.active, -1)).movedim(2, -1)  # (N, w, H, W, C)
    rows = F.layer_norm(rows, module.normalized_shape, None, None, module.eps)
    x = rows.movedim(-1, 2).flatten(1, 2)
    if module.weight is not None:
        x = x * layer.rows("weight", width).view(-1, 1, 1)
    if module.bias is not None:
        x = x + layer.rows("bias", width).view(-1, 1, 1)
    return _then_act(module, x)


def blur_pool(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Timm's anti-aliased downsampling; its filter is a constant that all branches share."""
    module = layer.module
    x = F.pad(x, module.padding, mode=module.pad_mode)
    weight = module.filt[:1].expand(x.shape[1], 1, module.filt_size, module.filt_size)
    return F.conv2d(x, weight, stride=module.stride, groups=x.shape[1])


def stochastic_depth(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Stochastic depth, drawn independently per sample and branch."""
    module = layer.module
    if not module.training or module.drop_prob == 0.0:
        return x
    dropped = drop_path(to_batch(x, width), module.drop_prob, True, module.scale_by_keep)
    return torch.as_tensor(to_channels(dropped, width))


def _then_act(module: nn.Module, x: Tensor) -> Tensor:
    """Apply the activation that is part of timm's norm-act layers."""
    if isinstance(module, (BatchNormAct2d, GroupNormAct, LayerNormAct, LayerNormAct2d)):
        x = module.act(module.drop(x))
    return x


# --- layers on branches one after another in the batch ----------------------------------------------------------------


def linear(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """A linear layer of w branches: one batched matrix product. (w*N, ..., in) -> (w*N, ..., out)."""
    if width.active == 1:  # fewer kernel launches, which limit small batches on GPUs
        return F.linear(x, layer.rows("weight", width), layer.rows("bias", width))
    rows = x.unflatten(0, (width.active, -1)).flatten(1, -2)  # (w, N * positions, in)
    weight = layer.stacked("weight", width).transpose(1, 2)  # (w, in, out)
    bias = layer.stacked("bias", width)  # (w, out)
    rows = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def light(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """A light layer of w branches, with scales only: one call with the shared weight on all images, (w*N, ...)."""
    module = layer.module
    if width.active == 1 and module.scales_weight(x):
        weight = module.scaled(module.weight, layer.rows("s", width), layer.rows("r", width))
        return module.product(x, weight, layer.rows("bias", width))

    def per_branch(name: str) -> Tensor:
        stacked = layer.stacked(name, width)  # (w, channels)
        return stacked.view(*stacked.shape, *module.along_channels(stacked[0]).shape[1:])

    y = module.product(with_weights("mul", x, per_branch("r"), width), module.weight)
    y = with_weights("mul", y, per_branch("s"), width)
    return y if module.bias is None else with_weights("add", y, per_branch("bias"), width)


def layer_norm(layer: Layer, x: Tensor, width: BranchSlice) -> Tensor:
    """Layer norm over the last dimensions, with a scale and shift per branch."""
    module = layer.module
    if width.active == 1:
        weight, bias = layer.rows("weight", width), layer.rows("bias", width)
        return _then_act(module, F.layer_norm(x, module.normalized_shape, weight, bias, module.eps))
    x = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if module.weight is not None:
        x = with_weights("mul", x, layer.stacked("weight", width), width)
    if module.bias is not None:
        x = with_weights("add", x, layer.stacked("bias", width), width)
    return _then_act(module, x)


# --- functions --------------------------------------------------------------------------------------------------------

_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow")},
    **{name: getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv")},
    **{name: getattr(torch, name) for name in ("maximum", "minimum")},
}


def concatenate_channels(tensors: Sequence[Tensor], width: BranchSlice) -> Tensor:
    """`torch.cat` along the channels of each branch."""
    return torch.cat([x.unflatten(1, (width.active, -1)) for x in tensors], 2).flatten(1, 2)


def split_channels(x: Tensor, size: int | Sequence[int], width: BranchSlice) -> tuple[Tensor, ...]:
    """`torch.split` along the channels of each branch."""
    parts = x.unflatten(1, (width.active, -1)).split(size, 2)
    return tuple(part.flatten(1, 2) for part in parts)


def chunk_channels(x: Tensor, chunks: int, width: BranchSlice) -> tuple[Tensor, ...]:
    """`torch.chunk` along the channels of each branch."""
    return tuple(part.flatten(1, 2) for part in x.unflatten(1, (width.active, -1)).chunk(chunks, 2))


def broadcast_channels(op: str, a: Tensor, b: Tensor, width: BranchSlice) -> Tensor:
    """An elementwise operation of two tensors in channels, one of which may have a single channel per branch."""
    operation = _OPERATIONS[op]
    if a.shape[1:2] == b.shape[1:2]:
        return operation(a, b)
    return operation(a.unflatten(1, (width.active, -1)), b.unflatten(1, (width.active, -1))).flatten(1, 2)


def with_weights_of_channels(op: str, a: Tensor, b: Tensor, width: BranchSlice, first: bool) -> Tensor:
    """An elementwise operation of a tensor in channels and weights (w, ...); `first`: the weights are `a`."""
    operation = _OPERATIONS[op]
    x, weight = (b, a) if first else (a, b)
    branches = x.unflatten(1, (width.active, -1))  # (N, w, C, ...)
    weight = weight.reshape(width.active, *(1,) * (branches.ndim - weight.ndim), *weight.shape[1:]).transpose(0, 1)
    return (operation(weight, branches) if first else operation(branches, weight)).flatten(1, 2)


def with_weights(op: str, a: Tensor, b: Tensor, width: BranchSlice, first: bool = False) -> Tensor:
    """An elementwise operation of a tensor in batch form and weights (w, ...); `first`: the weights are `a`."""
    operation = _OPERATIONS[op]
    x, weight = (b, a) if first else (a, b)
    branches = x.unflatten(0, (width.active, -1))  # (w, N, ...)
    weight = weight.reshape(width.active, *(1,) * (branches.ndim - weight.ndim), *weight.shape[1:])
    return (operation(weight, branches) if first else operation(branches, weight)).flatten(0, 1)


def expand_to_batch(weight: Tensor, sizes: Sequence[int], width: BranchSlice) -> Tensor:
    """`weight.expand(batch, ...)` for weights (w, 1, ...): (w*N, ...)."""
    batch, *rest = sizes
    return weight.expand(width.active, batch // width.active, *rest).flatten(0, 1)


def repeat_to_batch(weight: Tensor, repeats: Sequence[int], width: BranchSlice) -> Tensor:
    """`weight.repeat(batch, ...)` for weights (w, 1, ...): (w*N, ...)."""
    batch, *rest = repeats
    return weight.repeat(1, batch // width.active, *rest).flatten(0, 1)


def settings_allow_packing(module: nn.Module) -> bool:
    """Whether a module's settings allow the packed form of its type."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        return False
    # Without a momentum the statistics are cumulative averages, which need a factor per branch.
    return not (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None)
