"""The layers, functions and methods that have a packed form, and that form.

The form of a value is the arrangement of a level's branches in it. `hierens.branches.packed_graph` inserts conversions
where different forms meet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.norm import GroupNorm as TimmGroupNorm
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.nfnet import NormFreeBlock
from torch import Tensor, nn

from hierens.branches import layers
from hierens.branches.fused_layers import FusedConvolution, fused_convolution
from hierens.branches.light import LIGHT_LAYERS, LightLayer


class PackError(ValueError):
    """A block has no packed form; the message names the part that prevents it."""


class Form(Enum):
    """The arrangement of the branches in a value of the packed graph."""

    CHANNELS = "side by side: (N, w*C, ...)"
    PARENTS = "side by side, once for all siblings: (N, parents*C, ...)"
    BATCH = "one after another: (w*N, C, ...)"
    WEIGHT = "stacked, without a batch: (w, ...)"
    SHARED = "the same for all branches"


# Layers with a packed form: the form of their inputs and outputs, and the function.
LAYERS: dict[type[nn.Module], tuple[Form, Callable[..., Tensor]]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, tl.Conv2dSame), (Form.CHANNELS, layers.convolution)),
    **dict.fromkeys((tl.StdConv2d, StdConv2dSame), (Form.CHANNELS, layers.convolution)),
    **dict.fromkeys((tl.ScaledStdConv2d, tl.ScaledStdConv2dSame), (Form.CHANNELS, layers.convolution)),
    FusedConvolution: (Form.CHANNELS, fused_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, tl.BatchNormAct2d), (Form.CHANNELS, layers.batch_norm)),
    **dict.fromkeys((nn.GroupNorm, TimmGroupNorm, tl.GroupNorm1), (Form.CHANNELS, layers.group_norm)),
    **dict.fromkeys((tl.GroupNormAct, tl.GroupNorm1Act), (Form.CHANNELS, layers.group_norm)),
    **dict.fromkeys((tl.LayerNorm2d, tl.LayerNormAct2d), (Form.CHANNELS, layers.channel_layer_norm)),
    tl.BlurPool2d: (Form.CHANNELS, layers.blur_pool),
    tl.DropPath: (Form.CHANNELS, layers.stochastic_depth),
    **dict.fromkeys((nn.Linear, tl.Linear), (Form.BATCH, layers.linear)),
    **dict.fromkeys(LIGHT_LAYERS, (Form.BATCH, layers.light)),
    **dict.fromkeys((nn.LayerNorm, tl.LayerNorm, tl.LayerNormAct), (Form.BATCH, layers.layer_norm)),
}

# Layers without weights that treat each channel separately and alike: they run unchanged in channels and in batch.
PER_CHANNEL: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample),
    *(tl.AvgPool2dSame, MaxPool2dSame, nn.Dropout, nn.Identity),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
)
_TIMM_ACTIVATIONS = ("timm.layers.activations", "timm.layers.activations_me")

# Operations of two values, which occur in traces as operators, functions and methods, by their names in
# `hierens.branches.layers`.
BINARY: dict[Any, str] = {
    **{getattr(operator, name): name for name in ("add", "sub", "mul", "truediv", "pow")},
    **{getattr(operator, name): name for name in ("iadd", "isub", "imul", "itruediv")},
    **{getattr(torch, name): name for name in ("add", "sub", "mul", "pow", "maximum", "minimum")},
    **{name: name for name in ("add", "sub", "mul", "pow", "maximum", "minimum")},
    **{f"{name}_": f"i{name}" for name in ("add", "sub", "mul")},
    torch.div: "truediv",
    "div": "truediv",
    "div_": "itruediv",
}
# Operations of one tensor that treat each channel separately and alike.
UNARY = {
    *(operator.neg, torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.square, torch.sqrt, torch.exp, torch.abs),
    *(F.relu, F.relu6, F.silu, F.gelu, F.mish, F.leaky_relu, F.elu, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, F.tanh, F.softplus, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d),
    *(F.interpolate, F.dropout),
    *("clamp", "clamp_", "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone"),
    *("sqrt", "square", "exp", "abs", "float", "detach", "to", "type_as"),
}
# timm excludes these from tracing, since a trace loses a change in place; `PackedGraph.replace` keeps it.
TRACED = (NormFreeBlock,)
# Queries about a tensor rather than its values.
TENSOR_ATTRIBUTES = (
    *("shape", "size", "numel", "ndim", "dim", "dtype", "device", "requires_grad", "is_cuda", "get_device"),
    *("is_floating_point", "layout"),
)


def per_channel(module: nn.Module) -> bool:
    """Whether a layer runs unchanged on branches side by side: it has no weights and treats each channel separately."""
    if type(module) is nn.Flatten:
        return module.start_dim == 1
    known = type(module) in PER_CHANNEL or type(module).__module__ in _TIMM_ACTIVATIONS
    return known and next(module.parameters(), None) is None


def reads_parents(module: nn.Module, function: Callable[..., Tensor]) -> bool:
    """Whether a layer can read its input once for all siblings, instead of a copy for each."""
    return function in (layers.convolution, fused_convolution) and getattr(module, "groups", 0) == 1


def layer_form(module: nn.Module) -> tuple[Form, Callable[..., Tensor]] | None:
    """The packed form of a layer, and its function; None if its type has none or its settings do not allow it."""
    found = LAYERS.get(type(module))
    if isinstance(module, FusedConvolution):
        return found
    if isinstance(module, LightLayer) and "lora_a" in module.factors():
        return None  # every branch has matrices of its own
    inner = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
    if found is None or not layers.settings_allow_packing(module) or not all(per_channel(part) for part in inner):
        return None
    return found
