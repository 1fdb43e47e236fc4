"""A block run for all its branches at once: feature maps side by side in channels, weights side by side too.

This is the paper's grouped-convolution form (section 3.1, figure 2). The block is traced down to layers that have a
rule below; each is rewritten to work on w branches in one call, on tensors (N, w*C, ...) whose channels lie branch by
branch. What has no rule makes the block unpackable, and then it is looped: packing is an optimisation, never a need.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, BatchNormAct2d, BlurPool2d, Conv2dSame, DropPath, GroupNormAct
from timm.layers import GroupNorm as TimmGroupNorm
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import conv2d_same
from timm.layers.drop import drop_path
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, fx, nn


class PackError(ValueError):
    """A block has no packed form; the message says which part of it stands in the way."""


@dataclass(frozen=True)
class Width:
    """How many of a level's branches run: the first `active` of `total`."""

    active: int
    total: int

    def rows(self, packed: Tensor | None) -> Any:
        """The active branches' part, a view, of a parameter or buffer that holds every branch's along dim 0."""
        if packed is None or self.active == self.total:
            return packed
        return packed[: packed.shape[0] // self.total * self.active]


def pack(block: fx.GraphModule) -> fx.GraphModule:
    """A module `(x, width) -> y` over packed feature maps that reads its weights from the block's own modules.

    Args:
        block: takes one tensor and returns one tensor; its parameters and persistent buffers may be packed or not yet.

    Raises:
        PackError: a layer, function or argument for which there is no rule.
    """
    if sum(node.op == "placeholder" for node in block.graph.nodes) != 1:
        raise PackError("several values cross into the block")
    try:
        trace = _FineTracer().trace(block)
    except PackError:
        raise
    except Exception as error:
        raise PackError(f"it cannot be traced layer by layer: {error}") from error
    return _Rewriter(block, trace).rewrite()


# --- layers, over w branches at once -------------------------------------------------------------------------------


def conv2d(module: nn.Conv2d, x: Tensor, width: Width) -> Tensor:
    """Any convolution over w branches: the branches are further groups."""
    weight, bias = width.rows(module.weight), width.rows(module.bias)
    groups = module.groups * width.active
    run = conv2d_same if isinstance(module, Conv2dSame) else F.conv2d
    return run(x, weight, bias, module.stride, module.padding, module.dilation, groups)


def batch_norm(module: nn.BatchNorm2d, x: Tensor, width: Width) -> Tensor:
    """Batch norm is per channel, so branches are further channels; slices of the statistics are updated in place."""
    training = module.training or module.running_mean is None
    if module.training and module.num_batches_tracked is not None:
        width.rows(module.num_batches_tracked).add_(1)
    x = F.batch_norm(
        x,
        width.rows(module.running_mean),
        width.rows(module.running_var),
        width.rows(module.weight),
        width.rows(module.bias),
        training,
        module.momentum or 0.0,
        module.eps,
    )
    return _then_act(module, x)


def group_norm(module: nn.GroupNorm, x: Tensor, width: Width) -> Tensor:
    """Group norm over w branches: w times the groups."""
    groups = module.num_groups * width.active
    x = F.group_norm(x, groups, width.rows(module.weight), width.rows(module.bias), module.eps)
    return _then_act(module, x)


def linear(module: nn.Linear, x: Tensor, width: Width) -> Tensor:
    """A linear layer of w branches: one batched matrix product. (N, w*in) -> (N, w*out)."""
    if x.ndim != 2:
        raise PackError("a linear layer over more than one position")
    inputs = x.unflatten(1, (width.active, -1)).transpose(0, 1)  # (w, N, in)
    weight = width.rows(module.weight).unflatten(0, (width.active, -1)).transpose(1, 2)  # (w, in, out)
    if module.bias is None:
        outputs = torch.bmm(inputs, weight)
    else:
        outputs = torch.baddbmm(width.rows(module.bias).view(width.active, 1, -1), inputs, weight)
    return outputs.transpose(0, 1).flatten(1)


def blur_pool(module: BlurPool2d, x: Tensor, width: Width) -> Tensor:
    """Timm's anti-aliased downsampling; its filter is a constant that all branches share."""
    x = F.pad(x, module.padding, mode=module.pad_mode)
    weight = module.filt[:1].expand(x.shape[1], 1, module.filt_size, module.filt_size)
    return F.conv2d(x, weight, stride=module.stride, groups=x.shape[1])


def stochastic_depth(module: DropPath, x: Tensor, width: Width) -> Tensor:
    """Drop-path drawn per sample and branch, so that siblings are dropped independently of each other."""
    if not module.training or module.drop_prob == 0.0:
        return x
    branches = x.unflatten(1, (width.active, -1)).flatten(0, 1)  # (N*w, C, ...)
    dropped = drop_path(branches, module.drop_prob, True, module.scale_by_keep)
    return torch.as_tensor(dropped).unflatten(0, (-1, width.active)).flatten(1, 2)


def concatenate(tensors: Sequence[Tensor], width: Width) -> Tensor:
    """`torch.cat` along the channels of each branch."""
    return torch.cat([x.unflatten(1, (width.active, -1)) for x in tensors], 2).flatten(1, 2)


def split(x: Tensor, size: int | Sequence[int], width: Width) -> tuple[Tensor, ...]:
    """`torch.split` along the channels of each branch."""
    parts = x.unflatten(1, (width.active, -1)).split(size, 2)
    return tuple(part.flatten(1, 2) for part in parts)


def chunk(x: Tensor, chunks: int, width: Width) -> tuple[Tensor, ...]:
    """`torch.chunk` along the channels of each branch."""
    return tuple(part.flatten(1, 2) for part in x.unflatten(1, (width.active, -1)).chunk(chunks, 2))


def _then_act(module: nn.Module, x: Tensor) -> Tensor:
    """Timm's norm-act layers carry their activation inside."""
    if isinstance(module, (BatchNormAct2d, GroupNormAct)):
        x = module.act(module.drop(x))
    return x


_MODULE_RULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv2d: conv2d,
    Conv2dSame: conv2d,
    nn.BatchNorm2d: batch_norm,
    BatchNormAct2d: batch_norm,
    nn.GroupNorm: group_norm,
    TimmGroupNorm: group_norm,
    GroupNormAct: group_norm,
    nn.Linear: linear,
    TimmLinear: linear,
    BlurPool2d: blur_pool,
    DropPath: stochastic_depth,
}

# Layers that treat every channel alike and apart from the others: they need no rule.
_PER_CHANNEL = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.Dropout,
    nn.Identity,
    AvgPool2dSame,
    MaxPool2dSame,
)
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softplus,
)
_TIMM_ACTIVATIONS = ("timm.layers.activations", "timm.layers.activations_me")


def _needs_no_rule(module: nn.Module) -> bool:
    if type(module) is nn.Flatten:
        return module.start_dim == 1
    known = type(module) in _PER_CHANNEL or type(module) in _ACTIVATIONS
    return (known or type(module).__module__ in _TIMM_ACTIVATIONS) and not list(module.parameters())


def _module_rule(module: nn.Module) -> Callable[..., Tensor] | None:
    """The rule for a layer, if its settings allow one."""
    rule = _MODULE_RULES.get(type(module))
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return None
    if isinstance(module, nn.BatchNorm2d) and module.momentum is None:
        return None  # a cumulative average would need a factor for each branch
    if isinstance(module, (BatchNormAct2d, GroupNormAct)):
        inner = (module.drop, module.act)
        return rule if all(_needs_no_rule(part) for part in inner) else None
    return rule


# --- functions and methods -------------------------------------------------------------------------------------------

_ELEMENTWISE_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid, torch.tanh, torch.clamp),
    *(F.relu, F.relu6, F.silu, F.gelu, F.mish, F.leaky_relu, F.elu, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, F.tanh, F.softplus, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d),
}
_ELEMENTWISE_METHODS = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "clamp", "clamp_"),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone"),
}
_CHANNELS = (1, -3)


def _dim(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)


class _FineTracer(fx.Tracer):
    """Opens every module that neither has a rule nor does without one."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _module_rule(m) is not None or _needs_no_rule(m):
            return True
        if type(m).__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, fx.GraphModule)):
            raise PackError(f"{type(m).__name__} ({module_qualified_name}) has no grouped form")
        return False


class _Rewriter:
    """Writes the packed graph, node by node."""

    def __init__(self, block: fx.GraphModule, trace: fx.Graph) -> None:
        self.block, self.trace = block, trace
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.parts: dict[str, nn.Module] = {}

    def rewrite(self) -> fx.GraphModule:
        for node in self.trace.nodes:
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(node.name)
                self.width = self.graph.placeholder("width")
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise PackError("several values cross out of the block")
                self.graph.output(self.made[node.args[0]])
            else:
                self.made[node] = getattr(self, f"_{node.op}")(node)
        return fx.GraphModule(self.parts, self.graph, class_name="PackedBlock")

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, lambda old: self.made[old])

    def _call(self, rule: Callable[..., Any], *args: Any) -> fx.Node:
        mapped = fx.map_arg(args, lambda old: self.made.get(old, old))
        return self.graph.call_function(rule, (*mapped, self.width))

    def _call_module(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        module = self.block.get_submodule(name)
        self.parts[name] = module
        if _needs_no_rule(module):
            return self._copy(node)
        rule = _module_rule(module)
        assert rule is not None
        return self._call(rule, self.graph.get_attr(name), *node.args)

    def _call_function(self, node: fx.Node) -> fx.Node:
        if node.target in _ELEMENTWISE_FUNCTIONS or (node.target is operator.getitem and self._is_part(node)):
            return self._copy(node)
        if node.target in (torch.cat, torch.concat) and _dim(node, 1, 0) in _CHANNELS:
            return self._call(concatenate, node.args[0])
        return self._reshaping(node)

    def _call_method(self, node: fx.Node) -> fx.Node:
        return self._copy(node) if node.target in _ELEMENTWISE_METHODS else self._reshaping(node)

    def _reshaping(self, node: fx.Node) -> fx.Node:
        """What exists both as a function and as a method."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name == "split" and _dim(node, 2, 0) in _CHANNELS:
            return self._call(split, *node.args[:2])
        if name == "chunk" and _dim(node, 2, 0) in _CHANNELS:
            return self._call(chunk, *node.args[:2])
        if name == "mean":
            dims = _dim(node, 1, None)
            if dims is not None and set((dims,) if isinstance(dims, int) else dims) <= {2, 3, -1, -2}:
                return self._copy(node)
        if name == "flatten" and (node.args[1:] or (node.kwargs.get("start_dim"),)) == (1,):
            return self._copy(node)
        raise PackError(f"{name or node.target} has no grouped form")

    @staticmethod
    def _is_part(node: fx.Node) -> bool:
        """Whether a subscript picks one of the parts that split or chunk made."""
        source, index = node.args
        name = getattr(source, "target", None)
        name = name if isinstance(name, str) else getattr(name, "__name__", "")
        return isinstance(index, int) and name in ("split", "chunk")

    def _get_attr(self, node: fx.Node) -> fx.Node:
        raise PackError(f"the bare parameter or constant {node.target} has no grouped form")
