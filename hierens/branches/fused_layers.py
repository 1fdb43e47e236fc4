"""A convolution with its batch norm folded in and its activation attached, for inference.

On CPUs it runs by oneDNN's own operators, the ones that `torch.compile` uses when it freezes a model: the weights are
brought once into the blocked order that the kernels read, where `F.conv2d` does so on every call, and the activation is
applied while the results are still in registers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import HardSigmoid, HardSwish, Sigmoid, Swish, Tanh
from timm.layers.activations_me import HardSigmoidMe, HardSwishMe, SwishMe
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from hierens.branches.tensors import BranchSlice

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


class KernelCache:
    """Reordered weights of one layer, for each set of branches that runs together; no weight is held in two of them.

    All are known to be of these very weights: the same tensor in the same memory, not written since. Threads may share
    a cache. A copy, or what is read from a pickle, begins empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Any, Tensor] = {}
        self._asked: dict[Any, int] = {}  # when each set was last asked for, whether it is held or not
        self._now = 0
        # The tensor, a second one that keeps its memory from being given to another, and its version.
        self._source: tuple[Tensor, Tensor, int] | None = None

    def get(
        self, weight: Tensor, width: BranchSlice, groups: int, reorder: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """What was made for some branches, or is made now; None as long as there is no room.

        Args:
            weight: of all branches.
            width: tells which of them run.
            groups: of the convolution.
            reorder: called with their weights.
        """
        key = width.start, width.active, groups
        with self._lock:
            if not self._is_of(weight):
                self._drop()
                self._source = weight, weight.detach(), weight._version
            before, self._now = self._asked.get(key, 0), self._now + 1
            self._asked[key] = self._now
            if key in self._made:
                return self._made[key]
            rows = width.rows(weight)
            if not self._make_room(weight.numel() - rows.numel(), before):
                return None
            made = self._made[key] = reorder(rows)
            return made

    def _make_room(self, left: int, before: int) -> bool:
        """Drop what is in the way of a set, if none of that was used since the set was asked for the time before.

        So sets that take turns do not push each other out: that would cost more than to order the weights of some of
        them on every call, as `F.conv2d` does (1.5 to 3 times the time in small networks). Weights are counted, not
        bytes: oneDNN rounds channels up to whole blocks (0 to 4 % more in the backbones tried), and within a budget of
        bytes half of resnet50 would never be reordered at its full width.

        Args:
            left: how many weights the other sets may have.
            before: when the set was asked for the time before.
        """
        held = self.numel()
        oldest_first = sorted(self._made, key=self._asked.__getitem__)
        dropped: list[Any] = []
        while held > left:
            key = oldest_first[len(dropped)]
            if self._asked[key] > before:
                return False
            dropped.append(key)
            held -= self._made[key].numel()
        for key in dropped:
            del self._made[key]
        return True

    def _is_of(self, weight: Tensor) -> bool:
        if self._source is None:
            return False
        tensor, memory, version = self._source
        return tensor is weight and weight._version == version and weight.data_ptr() == memory.data_ptr()

    @property
    def bytes(self) -> int:
        """How much memory the reordered weights take."""
        return sum(torch.ops.mkldnn._nbytes(kernel) for kernel in list(self._made.values()))

    def numel(self) -> int:
        """How many weights are held."""
        return sum(kernel.numel() for kernel in list(self._made.values()))

    def __len__(self) -> int:
        """How many sets of branches have them."""
        return len(self._made)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._made.clear()
        self._asked.clear()
        self._source = None

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        """Without reordered weights, which cannot be copied and are made again when needed."""
        return type(self), ()


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
        self._kernels = KernelCache()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        return fused_convolution(self, x, BranchSlice(1, 1))

    def kernel(self, width: BranchSlice, groups: int, x: Tensor) -> Tensor | None:
        """The weights of some branches in oneDNN's order; None where they are best read as they are.

        They are made at their first use, and anew when the weights have been changed.
        """
        weight = self._parameters.get("weight")  # without nn.Module's own lookup, which small layers would feel
        if weight is None or weight.is_inference() or weight.dtype is not x.dtype:
            return None  # computed from others, without a version that tells when it is written, or a mistake
        if weight.requires_grad and torch.is_grad_enabled():
            return None

        return self._kernels.get(weight, width, groups, partial(self.reorder, groups, list(x.shape)))

    def reorder(self, groups: int, shape: Sequence[int], rows: Tensor) -> Tensor:
        """Weights in the order in which oneDNN reads them for images of a shape."""
        geometry = (self.padding, self.stride, self.dilation, groups)
        reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(rows, *geometry, shape)
        return reordered

    def attach_activation(self, attached: bool) -> None:
        """Run the activation within the convolution, if oneDNN knows it, or after it."""
        if self.activation is not None:
            self.attached = attachable(self.activation) if attached else None

    def forget(self) -> None:
        """Drop the reordered weights; those that are needed are made again."""
        self._kernels.clear()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedConvolution:
        """As every module's, for casting and moving."""
        with torch.inference_mode(False):  # so that the weights keep a version
            super()._apply(fn, recurse)
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def extra_repr(self) -> str:
        """Shape and stride."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


def fused_convolution(module: FusedConvolution, x: Tensor, width: BranchSlice, shared: bool = False) -> Tensor:
    """A fused convolution over w branches, as `hierens.branches.layers.convolution`."""
    groups = module.groups * (width.parents if shared else width.active)
    if module.same_pad:
        x = pad_same(x, list(module.kernel_size), list(module.stride), list(module.dilation))
    geometry: Any = (module.stride, module.padding, module.dilation, groups)
    if _onednn(x) and (weight := module.kernel(width, groups, x)) is not None:
        stride, padding, *others = geometry
        attached = None if _apart.get() else module.attached
        x = _run_onednn(x, weight, width.rows(module.bias), padding, stride, *others, *(attached or ("none", [], "")))
        return x if attached or module.activation is None else module.activation(x)
    x = F.conv2d(x, width.rows(module.weight), width.rows(module.bias), *geometry)
    return x if module.activation is None else module.activation(x)


_KNOWN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight", "_nbytes")
)
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
