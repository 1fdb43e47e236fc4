"""The roofline: peak rates of the device, and the minimum time of a depth.

The minimum time of a call is the larger of two times: its operations divided by the measured peak rate of a large
matrix product, and its bytes divided by the measured rate of a large copy.
"""

from __future__ import annotations

from typing import Any

import torch
from speed import timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hierens.core.modes import evaluating

_REPEATS = 5


def peaks(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, float]:
    """Peak operations per second (two per multiply-accumulate) and bytes per second: the best of several repeats."""
    side, count = (256, 2**20) if tiny else (8192, 2**30)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(lambda: a @ b) for _ in range(_REPEATS))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source)) for _ in range(_REPEATS))
    return {"operations_per_s": 2 * side**3 / product * 1e3, "bytes_per_s": 2 * count / copy * 1e3}


class Traffic(TorchDispatchMode):
    """Counts the values that convolutions and matrix products read and write.

    This is a lower bound for kernels that work layer by layer: operations between those layers are not counted, a
    tensor that is read several times (siblings, shortcuts) counts once, and weights do not count.

    Args:
        weights: the model's parameters and buffers.

    Attributes:
        values: numbers read and written.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.values = 0
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._read: list[Tensor] = []  # keeps them alive, so that no other tensor gets their address
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator; count its values if it is a convolution or matrix product."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            for tensor in (value for value in args if isinstance(value, Tensor)):
                of_weights = tensor.untyped_storage().data_ptr() in self._storages
                if not of_weights and tensor.data_ptr() not in self._known:
                    self._known.add(tensor.data_ptr())
                    self._read.append(tensor)
                    self.values += tensor.numel()
            written = result if isinstance(result, Tensor) else result[0]
            self._read.append(written)
            self.values += written.numel()
        return result


@torch.no_grad()
def activation_values(model: Any, size: tuple[int, int, int]) -> list[int]:
    """The values that convolutions and matrix products read and write for one image, per depth."""
    weights = [*model.parameters(), *model.buffers()]
    image, counted = torch.zeros(1, *size), []
    model.set_executor("looped")
    try:
        with evaluating(model):
            for depth in range(model.depths):
                with Traffic(weights) as traffic:
                    model(image, depth=depth)
                counted.append(traffic.values)
    finally:
        model.set_executor("auto")
    return counted


def least_ms(macs: int, parameters: int, values: int, batch: int, item: int, peak: dict[str, float]) -> float:
    """Minimum milliseconds of a call.

    Args:
        macs: multiply-accumulates per image.
        parameters: number of weights, which are read once per call.
        values: activations that are read and written per image.
        batch: number of images.
        item: bytes per value.
        peak: result of `peaks`.
    """
    moved = item * (parameters + batch * values)
    return 1e3 * max(2 * macs * batch / peak["operations_per_s"], moved / peak["bytes_per_s"])
