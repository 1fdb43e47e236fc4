"""Operating points of early exiting: thresholds, their agreement with the full ensemble, and their time for a batch."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from hierens.core.protocol import AdaptiveModel
from hierens.inference.calibration import exits
from hierens.inference.confidence import EVERYBODY, NOBODY

# Shares of images that may leave a depth with another class than the full ensemble's; 1: all leave at the first depth.
_RISKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 1.0)


class OperatingPoint(NamedTuple):
    """One way to run a model.

    Attributes:
        thresholds: for `Confidence`; `EVERYBODY` at a depth makes it the maximal one.
        agreement: expected share of images whose class is that of the full ensemble.
        reached: share of images that are evaluated at each depth.
        times_ms: expected time of batches of 1, 2, 4, ... images.
    """

    thresholds: tuple[float, ...]
    agreement: float
    reached: tuple[float, ...]
    times_ms: tuple[float, ...]

    @property
    def depth(self) -> int:
        """The maximal depth."""
        return sum(share > 0 for share in self.reached) - 1


def operating_points(certainties: Tensor, classes: Tensor, times_ms: Sequence[Sequence[float]]) -> list[OperatingPoint]:
    """The points that no cheaper point surpasses in agreement, from the highest agreement to the lowest cost.

    At each depth, the most certain images leave: as many as have at most a given share of other classes than the full
    ensemble's. This share and the maximal depth are varied. Shares are estimated with one more agreeing and one more
    disagreeing image (Laplace's rule of succession), so that few images make the thresholds careful.

    Args:
        certainties: of the prediction of every depth, (N, depths).
        classes: predicted at every depth, (N, depths).
        times_ms: to every depth (columns) of batches of 1, 2, 4, ... images (rows).
    """
    agrees, last = classes == classes[:, -1:], certainties.shape[1] - 1
    largest, found = 2 ** (len(times_ms) - 1), {}
    for risk in _RISKS:
        thresholds = _thresholds(certainties, agrees, risk)
        left = exits(certainties, thresholds)
        for deepest in range(last + 1):
            limited = thresholds[:deepest] + (EVERYBODY,) * (last - deepest)
            if limited not in found:
                found[limited] = _agreement_and_shares(agrees, left.clamp(max=deepest))
    cost = {one: batch_ms(times_ms, shares, largest) for one, (_, shares) in found.items()}
    front: list[OperatingPoint] = []
    for thresholds in sorted(found, key=lambda one: (cost[one], -found[one][0])):
        agreement, shares = found[thresholds]
        if not front or agreement > front[-1].agreement:
            times = tuple(batch_ms(times_ms, shares, 2**k) for k in range(len(times_ms)))
            front.append(OperatingPoint(thresholds, agreement, shares, times))
    return front[::-1]


def _agreement_and_shares(agrees: Tensor, left: Tensor) -> tuple[float, tuple[float, ...]]:
    """The expected agreement, and the shares of images that reach each depth, if they leave at the given ones, (N,)."""
    last = agrees.shape[1] - 1
    early = left < last
    count, wrong = int(early.sum()), int((early & ~agrees.gather(1, left[:, None])[:, 0]).sum())
    remaining = (len(left) - left.bincount(minlength=last + 1).cumsum(0)).tolist()
    shares = tuple(number / len(left) for number in (len(left), *remaining[:-1]))
    return 1 - count / len(left) * (wrong + 1) / (count + 2), shares


def batch_ms(times_ms: Sequence[Sequence[float]], shares: Sequence[float], batch: int) -> float:
    """Expected time of a batch of which the given shares of images reach each depth."""
    total = 0.0
    for depth, share in enumerate(shares):
        some = 1 - (1 - share) ** batch  # the probability that any image gets here
        if some > 0:
            size = share * batch / some
            before = _interpolated(times_ms, depth - 1, size) if depth else 0.0
            total += some * (_interpolated(times_ms, depth, size) - before)
    return total


def depth_times(model: AdaptiveModel, images: Tensor, repeats: int) -> tuple[float, ...]:
    """Median milliseconds from the start of an anytime prediction to every depth, after one warm-up."""
    runs = []
    for _ in range(repeats + 1):
        times, start = [], time.perf_counter()
        for step in model.anytime(images):
            if images.is_cuda:
                torch.cuda.synchronize()
            if step.leaves in model.sizes:
                times.append(1e3 * (time.perf_counter() - start))
        runs.append(times)
    return tuple(accumulate(map(median, zip(*runs[1:], strict=True)), max))


def _interpolated(times_ms: Sequence[Sequence[float]], depth: int, size: float) -> float:
    """The time to a depth, linear between the sizes that were measured and beyond the largest one."""
    sizes = [2**k for k in range(len(times_ms))]
    if len(sizes) == 1:
        return times_ms[0][depth]
    high = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    low_ms, high_ms = times_ms[high - 1][depth], times_ms[high][depth]
    return low_ms + (high_ms - low_ms) * (size - sizes[high - 1]) / (sizes[high] - sizes[high - 1])


def _thresholds(certainties: Tensor, agrees: Tensor, risk: float) -> tuple[float, ...]:
    """For each depth below the full one, the lowest threshold whose leaving images disagree in at most this share."""
    remaining, found = torch.ones(len(certainties), dtype=torch.bool), []
    for depth in range(certainties.shape[1] - 1):
        here, order = certainties[remaining, depth].sort(descending=True)
        wrong = (~agrees[remaining, depth])[order].cumsum(0)
        counts = torch.arange(1, len(here) + 1)
        held = ((wrong + 1) / (counts + 2) <= risk).nonzero()
        leaving = len(here) if risk >= 1 else int(held[-1]) + 1 if len(held) else 0
        if leaving == len(here):
            threshold = EVERYBODY if risk >= 1 or not leaving else float(here[-1])
        else:
            threshold = float(here[leaving - 1] + here[leaving]) / 2 if leaving else NOBODY
        found.append(threshold)
        remaining &= ~(certainties[:, depth] >= threshold)
    return tuple(found)
