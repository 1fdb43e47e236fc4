"""Throughput by a clock of our own: what a loader takes is waiting, what a step takes is not."""

import pytest
import torch
from accelerate import Accelerator

from hierens.training import throughput


def test_data_wait_counts_only_the_time_spent_waiting_for_data(monkeypatch):
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)

    def loader(seconds):
        nonlocal now
        for taken in seconds:
            now += taken
            yield torch.zeros(10, 1), torch.zeros(10)

    clock = throughput.Throughput(Accelerator(cpu=True))
    seen = []
    for images, _ in clock.watch(loader([3.0, 3.0, 0.0, 1.0])):
        now += 1.0 if len(seen) < 2 else 4.0
        seen.append(len(images))
        if len(seen) % 2 == 0:
            rate, waited = clock.since_last()
            expected = (20 / 8, 6 / 8) if len(seen) == 2 else (20 / 9, 1 / 9)
            assert (rate, waited) == pytest.approx(expected), "since it was last asked"
    assert seen == [10] * 4
