"""A convolution with its batch norm folded in and its activation attached, for inference.

On CPUs it runs by oneDNN's own operators, the ones that `torch.compile` uses when it freezes a model: the weights are
brought once into the blocked order that the kernels read, where `F.conv2d` does so on every call, and the activation is
applied while the results are still in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import HardSigmoid, HardSwish, Sigmoid, Swish, Tanh
from timm.layers.activations_me import HardSigmoidMe, HardSwishMe, SwishMe
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from hierens.packed import Width

_Attached = tuple[str, list[float], str]  # oneDNN's name of an activation, its numbers and its variant
_NAMES: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.SiLU, Swish, SwishMe), "swish"),
    **dict.fromkeys((nn.Sigmoid, Sigmoid), "sigmoid"),
    **dict.fromkeys((nn.Tanh, Tanh), "tanh"),
    **dict.fromkeys((nn.Hardswish, HardSwish, HardSwishMe), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, HardSigmoid, HardSigmoidMe), "hardsigmoid"),
    nn.ReLU: "relu",
}


def attachable(activation: nn.Module) -> _Attached | None:
    """How oneDNN calls an activation; None if it does not know it."""
    if isinstance(activation, nn.Hardtanh):  # ReLU6 too
        return "hardtanh", [float(activation.min_val), float(activation.max_val)], ""
    if isinstance(activation, nn.LeakyReLU):
        return "leaky_relu", [float(activation.negative_slope)], ""
    if type(activation) is nn.GELU:
        return "gelu", [], activation.approximate
    name = _NAMES.get(type(activation))
    return (name, [], "") if name else None


_apart = ContextVar("apart", default=False)


@contextmanager
def activations_apart() -> Iterator[None]:
    """Inside, activations run after their convolutions: oneDNN's attached ReLU makes 0 of what is not a number."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def loses_no_number(x: Tensor) -> bool:
    """Whether attached activations may run on images: all finite, or nothing that is attached runs there.

    A sum that overflows says no, too, which costs time alone.
    """
    return torch.compiler.is_compiling() or not x.is_cpu or math.isfinite(x.sum().item())


class FusedConvolution(nn.Module):
    """A 2-D convolution, its batch norm and its activation in one, with the weights of one or more branches.

    Args:
        convolution: the layer to take stride, padding, dilation and groups from.
        weight: (w*O, C / groups, kH, kW), batch norm folded in.
        bias: (w*O,).
        activation: applied to the result; what oneDNN does not know runs after it.
        same_pad: TensorFlow's padding, computed from the input's size.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        activation: nn.Module | None = None,
        same_pad: bool = False,
    ) -> None:
        super().__init__()
        frozen = weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(frozen, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.same_pad = same_pad
        self.padding = (0, 0) if same_pad else convolution.padding
        self.activation = activation
        self.attached: _Attached | None = ("none", [], "") if activation is None else attachable(activation)
        self._kernels: dict[Any, tuple[int, Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        return fused_convolution(self, x, Width(1, 1))

    def __getstate__(self) -> dict[str, Any]:
        """Without the reordered weights, which cannot be copied and are made again when needed."""
        return {**self.__dict__, "_kernels": {}}

    def kernel(self, width: Width, groups: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights of some branches in oneDNN's order, and their biases.

        They are made at their first use, and anew when the weights have been changed.
        """
        plain: Any = self._parameters["weight"]  # without nn.Module's own lookup, which small layers would feel
        key = (plain.data_ptr(), width.start, width.active, groups)
        version = 0 if plain.is_inference() else plain._version
        made = self._kernels.get(key)
        if made is None or made[0] != version:
            args = (self.padding, self.stride, self.dilation, groups, list(x.shape))
            weight = torch.ops.mkldnn._reorder_convolution_weight(width.rows(plain), *args)
            made = self._kernels[key] = version, weight, width.rows(self.bias)
        return made[1], made[2]

    def part_activation(self) -> None:
        """Run the activation after the convolution from now on, as weights that are not finite need it."""
        if self.activation is not None:
            self.attached = None

    def forget(self) -> None:
        """Drop the reordered weights; those that are needed are made again."""
        self._kernels.clear()

    def extra_repr(self) -> str:
        """Shape and stride."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


def fused_convolution(module: FusedConvolution, x: Tensor, width: Width, shared: bool = False) -> Tensor:
    """A fused convolution over w branches, as `hierens.packed_layers.convolution`."""
    groups = module.groups * (width.parents if shared else width.active)
    if module.same_pad:
        x = pad_same(x, list(module.kernel_size), list(module.stride), list(module.dilation))
    geometry: Any = (module.stride, module.padding, module.dilation, groups)
    if _onednn(x):
        weight, bias = module.kernel(width, groups, x)
        stride, padding, *others = geometry
        attached = None if _apart.get() else module.attached
        x = _run_onednn(x, weight, bias, padding, stride, *others, *(attached or ("none", [], "")))
        return x if attached or module.activation is None else module.activation(x)
    x = F.conv2d(x, width.rows(module.weight), width.rows(module.bias), *geometry)
    return x if module.activation is None else module.activation(x)


_KNOWN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
_run_onednn: Any = torch.ops.mkldnn._convolution_pointwise.default if _KNOWN else None
if _KNOWN and torch.ops.mkldnn._convolution_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """So that torch's counter sees these convolutions as it sees its own."""
        return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def _onednn(x: Tensor) -> bool:
    """Whether to call oneDNN itself: on CPUs, when nothing is recorded for a backward pass or by a compiler."""
    if torch.compiler.is_compiling() or not _KNOWN or x.device.type != "cpu":
        return False  # before anything that a compiler cannot look into
    types = x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    recorded = x.requires_grad and torch.is_grad_enabled()
    ordered = x.is_contiguous(memory_format=torch.channels_last)
    return bool(torch.backends.mkldnn.enabled and types and ordered and not recorded)
