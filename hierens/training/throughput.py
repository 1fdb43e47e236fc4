"""Measures the speed of training, and the fraction of the time in which it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

_BETWEEN_LOOKS = 10  # batches between measurements on accelerators, where each one waits for the device


class Throughput:
    """Measures the throughput of a loader.

    Args:
        accelerator: gives the number of processes and the device.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._processes, self._asynchronous = accelerator.num_processes, accelerator.device.type != "cpu"
        self._start, self._waited, self._images, self._batches, self._looks = time.perf_counter(), 0.0, 0, 0, 0

    def watch(self, loader: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
        """The loader's batches; the time until each is measured."""
        batches = iter(loader)
        while True:
            look = not self._asynchronous or self._batches % _BETWEEN_LOOKS == 0
            if look and self._asynchronous:
                torch.accelerator.synchronize()  # the device's remaining work is not time spent waiting for data
            start = time.perf_counter()
            batch = next(batches, None)
            if look:
                self._waited += time.perf_counter() - start
                self._looks += 1
            if batch is None:
                return
            self._batches += 1
            self._images += len(batch[0]) * self._processes
            yield batch

    def since_last(self) -> tuple[float, float]:
        """The throughput since the last call.

        Returns:
            Images per second over all processes, and the fraction (0 to 1) of the time spent waiting for a batch.
        """
        now = time.perf_counter()
        elapsed = now - self._start
        waited = self._waited * max(self._batches / max(self._looks, 1), 1)
        rate, fraction = self._images / elapsed, min(waited / elapsed, 1.0)
        self._start, self._waited, self._images, self._batches, self._looks = now, 0.0, 0, 0, 0
        return rate, fraction
