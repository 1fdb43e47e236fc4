"""The stream of benchmarks/drift.py: images that change half-way, bursty arrivals, and a server with one queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.inference.policies import LatencyObjective, Policy

PHASES = ("clean", "noisy", "blurred", "dark", "clean again")
BURST, BURST_S, EVERY_S = 2.0, 1.0, 5.0  # rate in a burst, relative to that between bursts; its length; their period


def corrupted(images: Tensor, phase: str) -> Tensor:
    """Images (N, 1, 28, 28) from 0 to 1 with a made corruption, in steps of 1/255 as a camera would give them."""
    if phase == "noisy":
        images = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    elif phase == "blurred":
        kernel = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))
        kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
        images = F.conv2d(F.pad(images, (5, 5, 5, 5), mode="replicate"), kernel)
        images = F.conv2d(images, kernel.transpose(2, 3))
    elif phase == "dark":
        images = 0.15 * images
    return (255 * images.clamp(0, 1)).round() / 255


def arrivals(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Times of a Poisson process whose rate is doubled in the last second of every five."""
    random, times = np.random.default_rng(seed), []
    most = rate * BURST
    at = random.exponential(1 / most)
    while at < seconds:
        burst = at % EVERY_S >= EVERY_S - BURST_S
        if burst or random.random() < 1 / BURST:
            times.append(at)
        at += random.exponential(1 / most)
    return np.array(times)


@dataclass
class Outcome:
    """What happened to each request.

    Attributes:
        due: scheduled arrival, in seconds from the start.
        latency_ms: from the scheduled arrival to the answer; NaN without one.
        predicted: the class.
        macs: multiply-accumulates.
        answers: how often it was answered.
        shadow_s: seconds in which the shadow was computed.
        states: metrics of the controller, by the second.
    """

    due: np.ndarray
    latency_ms: np.ndarray
    predicted: np.ndarray
    macs: np.ndarray
    answers: np.ndarray
    shadow_s: float = 0.0
    states: list[dict[str, float]] = field(default_factory=list)


def serve(model: Any, policy: Policy, batch: int, due: np.ndarray, images: Sequence[Tensor]) -> Outcome:
    """Answer requests one batch after the other, in real time.

    Args:
        model: the ensemble.
        policy: of each batch; a `LatencyObjective` also chooses the batch size.
        batch: otherwise the largest batch.
        due: arrival of each request.
        images: of each request, (C, H, W).
    """
    count = len(due)
    found = Outcome(due, np.full(count, np.nan), np.zeros(count, int), np.zeros(count), np.zeros(count, int))
    controller = policy if isinstance(policy, LatencyObjective) else None
    queue: deque[int] = deque()
    coming, start = 0, time.perf_counter()
    while coming < count or queue:
        now = time.perf_counter() - start
        while coming < count and due[coming] <= now:
            queue.append(coming)
            coming += 1
        age = 1e3 * (now - due[queue[0]]) if queue else 0.0
        if controller:
            if len(found.states) <= now:
                found.states.append({"at": now, **controller.metrics()})
            batch = controller.batch_size(len(queue), age) if queue else batch
        if queue:
            taken = [queue.popleft() for _ in range(min(batch, len(queue)))]
            _answer(found, taken, policy(model, torch.stack([images[one] for one in taken])), start)
            if controller:
                controller.observe(found.latency_ms[taken].tolist())
        late = 1e3 * (time.perf_counter() - start - due[queue[0]]) if queue else 0.0
        if controller and controller.shadow(model, len(queue), late):
            continue
        if not queue and coming < count:
            time.sleep(max(0.0, due[coming] - (time.perf_counter() - start)))
    if controller:
        found.shadow_s = controller.metrics()["shadow_s"]
    return found


def _answer(found: Outcome, taken: list[int], prediction: Any, start: float) -> None:
    found.predicted[taken] = prediction.logits.argmax(-1).numpy()
    found.macs[taken] = prediction.macs.numpy()
    found.latency_ms[taken] = 1e3 * (time.perf_counter() - start - found.due[taken])
    found.answers[taken] += 1
