"""`FusedConvolution`: a convolution with its batch norm folded in and its activation attached, for inference.

On CPUs it calls the oneDNN operators that `torch.compile` uses for frozen models. The weights are reordered once into
the blocked layout that the kernels read, which `F.conv2d` does at every call, and the activation is applied while the
results are still in registers.
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

_Attached = tuple[str, list[float], str]  # oneDNN's name of an activation, its scalars and its algorithm
_NAMES: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.SiLU, Swish, SwishMe), "swish"),
    **dict.fromkeys((nn.Sigmoid, Sigmoid), "sigmoid"),
    **dict.fromkeys((nn.Tanh, Tanh), "tanh"),
    **dict.fromkeys((nn.Hardswish, HardSwish, HardSwishMe), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, HardSigmoid, HardSigmoidMe), "hardsigmoid"),
    nn.ReLU: "relu",
}


def attachable(activation: nn.Module) -> _Attached | None:
    """An activation in oneDNN's terms; None if oneDNN does not have it."""
    if isinstance(activation, nn.Hardtanh):  # ReLU6 too
        return "hardtanh", [float(activation.min_val), float(activation.max_val)], ""
    if isinstance(activation, nn.LeakyReLU):
        return "leaky_relu", [float(activation.negative_slope)], ""
    if type(activation) is nn.GELU:
        return "gelu", [], activation.approximate
    name = _NAMES.get(type(activation))
    return (name, [], "") if name else None


_separate = ContextVar("separate", default=False)


@contextmanager
def separate_activations() -> Iterator[None]:
    """Run activations after their convolutions: oneDNN's attached ReLU turns NaN into 0."""
    token = _separate.set(True)
    try:
        yield
    finally:
        _separate.reset(token)


def attached_activations_are_safe(x: Tensor) -> bool:
    """Whether attached activations are correct for these images: all are finite, or oneDNN will not run.

    False also if the sum overflows, which only costs time.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):  # the model refuses what is no tensor
        return True
    return not x.is_cpu or math.isfinite(x.sum().item())


class KernelCache:
    """The reordered weights of one layer, for each set of branches that runs in one call; the sets are disjoint.

    Entries are valid only for the same tensor in the same memory, without writes since. Threads may share a cache.
    Copies and unpickled caches are empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: dict[Any, Tensor] = {}
        self._last_use: dict[Any, int] = {}  # of each set, also of those without an entry
        self._now = 0
        # The tensor, another reference to its memory so that this is not reused, and the version.
        self._source: tuple[Tensor, Tensor, int] | None = None

    def get(
        self, weight: Tensor, width: BranchSlice, groups: int, reorder: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The reordered weights of some branches, created if necessary; None while there is no room for them.

        Args:
            weight: of all branches.
            width: which of them run.
            groups: of the convolution.
            reorder: a function of their weights.
        """
        key = width.start, width.active, groups
        with self._lock:
            if not self._is_of(weight):
                self._drop()
                self._source = weight, weight.detach(), weight._version
            before, self._now = self._last_use.get(key, 0), self._now + 1
            self._last_use[key] = self._now
            if key in self._kernels:
                return self._kernels[key]
            rows = width.rows(weight)
            if not self._make_room(weight.numel() - rows.numel(), before):
                return None
            kernel = self._kernels[key] = reorder(rows)
            return kernel

    def _make_room(self, left: int, before: int) -> bool:
        """Drop the entries that leave no room for a set, unless one of them was used since the set's previous use.

        So sets that are used in turn do not evict each other, which would take longer than reordering the weights of
        some of them at every call, as `F.conv2d` does (1.5 to 3 times the time in small networks). The budget counts
        weights, not bytes: oneDNN pads channels to whole blocks (0 to 4 % more in the backbones tried), and with a
        budget in bytes half of resnet50 would never be reordered at its full width.

        Args:
            left: how many weights the other sets may have.
            before: the time of the set's previous use.
        """
        size = self.numel()
        oldest_first = sorted(self._kernels, key=self._last_use.__getitem__)
        dropped: list[Any] = []
        while size > left:
            key = oldest_first[len(dropped)]
            if self._last_use[key] > before:
                return False
            dropped.append(key)
            size -= self._kernels[key].numel()
        for key in dropped:
            del self._kernels[key]
        return True

    def _is_of(self, weight: Tensor) -> bool:
        if self._source is None:
            return False
        tensor, memory, version = self._source
        return tensor is weight and weight._version == version and weight.data_ptr() == memory.data_ptr()

    @property
    def bytes(self) -> int:
        """Memory of the reordered weights."""
        return sum(torch.ops.mkldnn._nbytes(kernel) for kernel in list(self._kernels.values()))

    def numel(self) -> int:
        """Number of reordered weights."""
        return sum(kernel.numel() for kernel in list(self._kernels.values()))

    def __len__(self) -> int:
        """Number of sets of branches with an entry."""
        return len(self._kernels)

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._kernels.clear()
        self._last_use.clear()
        self._source = None

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        """An empty cache: reordered weights cannot be copied, and are created again when needed."""
        return type(self), ()


class FusedConvolution(nn.Module):
    """A 2-D convolution, its batch norm and its activation in one layer, with the weights of one or more branches.

    Args:
        convolution: the layer that defines stride, padding, dilation and groups.
        weight: (w*O, C / groups, kH, kW), with the batch norm folded in.
        bias: (w*O,).
        activation: of the result; runs as a separate operation if oneDNN does not have it.
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
        """The weights of some branches in oneDNN's layout; None if `F.conv2d` should read the plain weights.

        They are created at their first use, and again after the weights have changed.
        """
        weight = self._parameters.get("weight")  # faster than attribute access, which matters for small layers
        if weight is None or weight.is_inference() or weight.dtype is not x.dtype:
            return None  # a computed weight, one without a version counter, or a type that `F.conv2d` will refuse
        if weight.requires_grad and torch.is_grad_enabled():
            return None
        return self._kernels.get(weight, width, groups, partial(self.reorder, groups, list(x.shape)))

    def reorder(self, groups: int, shape: Sequence[int], rows: Tensor) -> Tensor:
        """Weights in oneDNN's layout for images of a shape."""
        geometry = (self.padding, self.stride, self.dilation, groups)
        reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(rows, *geometry, shape)
        return reordered

    def attach_activation(self, attached: bool) -> None:
        """Run the activation inside the convolution, if oneDNN has it, or after it."""
        if self.activation is not None:
            self.attached = attachable(self.activation) if attached else None

    def forget(self) -> None:
        """Drop the reordered weights, which are created again when needed."""
        self._kernels.clear()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedConvolution:
        """Cast or move the layer."""
        with torch.inference_mode(False):  # so that the weights have a version counter
            super()._apply(fn, recurse)
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def extra_repr(self) -> str:
        """Shape, stride and groups."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


def fused_convolution(module: FusedConvolution, x: Tensor, width: BranchSlice, shared: bool = False) -> Tensor:
    """A fused convolution of w branches: see `hierens.branches.layers.convolution`."""
    groups = module.groups * (width.parents if shared else width.active)
    if module.same_pad:
        x = pad_same(x, list(module.kernel_size), list(module.stride), list(module.dilation))
    geometry: Any = (module.stride, module.padding, module.dilation, groups)
    if _onednn(x) and (weight := module.kernel(width, groups, x)) is not None:
        stride, padding, *others = geometry
        attached = None if _separate.get() else module.attached
        x = _run_onednn(x, weight, width.rows(module.bias), padding, stride, *others, *(attached or ("none", [], "")))
        return x if attached or module.activation is None else module.activation(x)
    x = F.conv2d(x, width.rows(module.weight), width.rows(module.bias), *geometry)
    return x if module.activation is None else module.activation(x)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight", "_nbytes")
)
_run_onednn: Any = torch.ops.mkldnn._convolution_pointwise.default if _HAS_ONEDNN else None
if _HAS_ONEDNN and torch.ops.mkldnn._convolution_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """Let torch's counter count these convolutions like its own."""
        return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def _onednn(x: Tensor) -> bool:
    """Whether to call oneDNN's operators: on CPUs, without autograd and outside compilation."""
    if torch.compiler.is_compiling() or not _HAS_ONEDNN or x.device.type != "cpu":
        return False  # first, since the checks below cannot be compiled
    types = x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    recorded = x.requires_grad and torch.is_grad_enabled()
    ordered = x.is_contiguous(memory_format=torch.channels_last)
    return bool(torch.backends.mkldnn.enabled and types and ordered and not recorded)
