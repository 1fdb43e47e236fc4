"""Avoids a kernel of oneDNN that corrupts memory.

On CPUs with AVX2 and no AVX-512, the weight gradient of a 1x1 convolution with stride above 1, channels last and 2 to 7
input channels reads and writes outside its buffers (docs/explanation/onednn.md). A 1x1 convolution with stride 1 on
every stride-th pixel gives the same values and uses another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHANNELS_IN_A_BLOCK = 8  # oneDNN's block of channels with AVX2: the kernel fails with fewer than one block


class SubsampledConvolutions(TorchFunctionMode):
    """In this context, strided 1x1 convolutions with few channels are computed on subsampled images on a CPU.

    It intercepts the function that every two-dimensional convolution calls, so it works for looped and grouped levels
    and changes no module.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `F.conv2d` where it would run the kernel; call everything else unchanged."""
        kwargs = dict(kwargs or {})
        if func is not F.conv2d:
            return func(*args, **kwargs)
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given.update(zip(names, args, strict=False), **kwargs)
        x, stride = given["input"], _pair(given["stride"])
        if x.device.type != "cpu" or not _narrow(given["weight"], stride):
            return func(*args, **kwargs)
        if isinstance(given["padding"], str):
            given["padding"] = 0  # for a kernel of one pixel, `same` and `valid` mean no padding
        if any(padding := _pair(given["padding"])):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        x = x[..., :: stride[0], :: stride[1]]
        return F.conv2d(x, given["weight"], given["bias"], groups=given["groups"])


def subsampled_convolutions(*models: nn.Module | None) -> AbstractContextManager[Any]:
    """`SubsampledConvolutions` if one of the models has such a layer, else a context that does nothing.

    Examples:
        >>> type(subsampled_convolutions(nn.Conv2d(4, 8, 1, stride=2))).__name__
        'SubsampledConvolutions'
        >>> type(subsampled_convolutions(nn.Conv2d(64, 128, 1, stride=2), None)).__name__
        'nullcontext'
    """
    layers = (layer for model in models if model is not None for layer in model.modules())
    found = any(isinstance(layer, nn.Conv2d) and _narrow(layer.weight, layer.stride) for layer in layers)
    return SubsampledConvolutions() if found else nullcontext()


def _narrow(weight: Tensor, stride: Sequence[int]) -> bool:
    _, channels, *kernel = weight.shape
    return kernel == [1, 1] and max(stride) > 1 and channels < _CHANNELS_IN_A_BLOCK


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
