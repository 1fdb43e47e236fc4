"""The roofline: what the device reaches at best, and what a depth needs at least.

The least time of a call is the longer of two: its operations over the measured peak of a large matrix product, and its
bytes over the measured rate of a large copy.
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
    """Operations per second (two for a multiply-accumulate) and bytes per second, the best of some repeats."""
    side, count = (256, 2**20) if tiny else (8192, 2**30)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(lambda: a @ b) for _ in range(_REPEATS))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source)) for _ in range(_REPEATS))
    return {"operations_per_s": 2 * side**3 / product * 1e3, "bytes_per_s": 2 * count / copy * 1e3}


class Traffic(TorchDispatchMode):
    """Counts the values that convolutions and matrix products read and write inside.

    A lower bound for kernels that work layer by layer: whatever stands between those layers counts as part of them, a
    tensor that several read (siblings, shortcuts) is read once, and weights are left out.

    Args:
        weights: the model's parameters and buffers.

    Attributes:
        values: numbers read and written.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.values = 0
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._read: list[Tensor] = []  # kept, so that no other tensor takes their place
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count an operator that has operations of its own, and run it."""
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
    """For every depth, the values that its convolutions and matrix products read and write for one image."""
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
    """Milliseconds that a call takes at least.

    Args:
        macs: multiply-accumulates per image.
        parameters: weights that are read, once a call.
        values: activations that are read and written for an image.
        batch: images.
        item: bytes of a value.
        peak: of `peaks`.
    """
    moved = item * (parameters + batch * values)
    return 1e3 * max(2 * macs * batch / peak["operations_per_s"], moved / peak["bytes_per_s"])
