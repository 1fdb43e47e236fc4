"""Chooses the operating point and the size of the next batch, from the queue and measured times."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from hierens.inference.operating_points import OperatingPoint, batch_ms

_LOG = logging.getLogger(__name__)
_HORIZON = 5.0  # targets over which arrivals are averaged, and for which the growth of the queue is predicted
_RISE = 0.8  # share of the planned latency within which a point of higher agreement must fit: hysteresis
_SPARE = 0.5  # share of the planned latency within which a point must fit whose agreement is above the aim
_STEP = 0.02  # change of the planned share of the target by a late image


@dataclass
class Planner:
    """The state of the queue and of the machine, as far as batches depend on it.

    Attributes:
        target_ms: of latencies.
        percentile: of latencies that should be within the target.
        agreement: bound of the share of images whose class is that of the full ensemble.
        times_ms: to every depth (columns) of batches of 1, 2, 4, ... images (rows).
        points: operating points in falling order of agreement and cost.
        point: the chosen one.
        batch: the chosen batch size.
        overloaded: whether no point is expected to hold the target.
        rate: arriving images per second.
        margin: share of the target that is planned.
        aim: expected agreement with which the bound is met; more is chosen only where time is left for a burst.
        measured_ms: moving average of the times of batches.
        expected_ms: moving average of the times that were expected for these batches.
    """

    target_ms: float
    percentile: float
    agreement: float
    times_ms: Sequence[Sequence[float]] = ()
    points: Sequence[OperatingPoint] = ()
    point: OperatingPoint | None = None
    batch: int = 1
    overloaded: bool = False
    rate: float = 0.0
    margin: float = 0.8
    aim: float = field(init=False)
    measured_ms: float = 0.0
    expected_ms: float = 0.0
    _sizes: list[int] = field(default_factory=list, init=False)
    _before: float | None = field(default=None, init=False)
    _left: int = field(default=0, init=False)
    _logged: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self.aim = self.half_way

    @property
    def half_way(self) -> float:
        """The agreement with half of the disagreement that the bound allows."""
        return (1 + self.agreement) / 2

    @property
    def slowdown(self) -> float:
        """Measured over expected time: other work on the machine, and images that leave later than those fitted on."""
        return self.measured_ms / self.expected_ms if self.expected_ms else 1.0

    def replace_points(self, points: Sequence[OperatingPoint]) -> OperatingPoint:
        """Take other points, and continue with the one whose agreement is nearest to that of the present one."""
        before = self.point.agreement if self.point else 1.0
        self.points, self._sizes = points, [2**k for k in range(len(self.times_ms))]
        self.point = min(points, key=lambda one: abs(one.agreement - before))
        return self.point

    def replace_times(self, times_ms: Sequence[Sequence[float]]) -> None:
        """Take newly measured times."""
        self.times_ms, self.measured_ms, self.expected_ms = times_ms, 0.0, 0.0

    def plan(self, waiting: int, oldest_ms: float) -> int:
        """Choose the point with the highest agreement that is expected to hold the target, and its batch size."""
        self._count_arrivals(waiting)
        before, (self.point, self.batch, self.overloaded) = self.point, self._choose(waiting, oldest_ms)
        if self.point is not before and time.perf_counter() - self._logged > 1:
            self._logged = time.perf_counter()
            _LOG.info(
                "operating point: depth %d, thresholds %s, batches of %d, expected agreement %.4f; %d images wait, "
                "%.0f arrive per second%s",
                *(self.point.depth, [round(t, 3) for t in self.point.thresholds], self.batch, self.point.agreement),
                *(waiting, self.rate, "; overloaded" if self.overloaded else ""),
            )
        return self.batch

    def fits(self, extra_ms: float, waiting: int, oldest_ms: float) -> bool:
        """Whether the target still holds if the next batch is delayed."""
        assert self.point is not None
        latency_ms = self._latency_ms(self.point, self._sizes.index(self.batch), waiting, oldest_ms)
        return latency_ms + extra_ms <= self.target_ms * self.margin

    def completed(self, point: OperatingPoint, images: int, milliseconds: float) -> None:
        """Record the time of a batch."""
        self._left -= images
        self.measured_ms = 0.95 * self.measured_ms + 0.05 * milliseconds
        self.expected_ms = 0.95 * self.expected_ms + 0.05 * batch_ms(self.times_ms, point.reached, images)

    def observe(self, latencies_ms: Sequence[float]) -> None:
        """Plan less of the target where more than the allowed share of latencies exceeds it, and more where less does.

        Latencies under overload are not counted: they would exceed it whatever is planned.
        """
        late = sum(value > self.target_ms for value in latencies_ms)
        excess = late - (1 - self.percentile / 100) * len(latencies_ms)
        if not self.overloaded:
            self.margin = min(max(self.margin - _STEP * excess, 0.3), 1.0)

    def compare(self, agreed: bool, expected: float) -> None:
        """Aim higher where more images disagree than half of what the bound allows, and lower where fewer do.

        Half, so that the bound holds also while images change. Images for which less than the bound was expected,
        because of the load, are not counted.
        """
        if expected >= self.agreement:
            step = (1 - self.agreement) / 4 * (self.half_way - agreed)
            self.aim = min(max(self.aim + step, self.agreement), 1.0)

    def _choose(self, waiting: int, oldest_ms: float) -> tuple[OperatingPoint, int, bool]:
        assert self.point is not None
        enough = min(point.agreement for point in self.points if point.agreement >= self.aim)
        for point in self.points:
            planned = self.target_ms * self.margin * (_RISE if point.agreement > self.point.agreement else 1)
            planned *= _SPARE if point.agreement > enough else 1
            latencies = [self._latency_ms(point, k, waiting, oldest_ms) for k in range(len(self._sizes))]
            if min(latencies) <= planned:
                return point, self._sizes[latencies.index(min(latencies))], False
        cheapest = self.points[-1]
        per_image = [ms / size for ms, size in zip(cheapest.times_ms, self._sizes, strict=True)]
        return cheapest, self._sizes[per_image.index(min(per_image))], True

    def _latency_ms(self, point: OperatingPoint, index: int, waiting: int, oldest_ms: float) -> float:
        """The larger expected latency: of the oldest image, or of those that arrive within the horizon."""
        size, batch = self._sizes[index], point.times_ms[index] * self.slowdown
        now = point.times_ms[min(bisect_left(self._sizes, waiting), index)] * self.slowdown
        growth = max(0.0, self.rate - 1e3 * size / batch) * _HORIZON * self.target_ms / 1e3
        return max(oldest_ms + now, batch * (1 + max(1.0, (waiting + growth) / size)))

    def _count_arrivals(self, waiting: int) -> None:
        """Update the rate of arrivals: the growth of the queue, and what was taken from it."""
        now = time.perf_counter()
        if self._before is not None and now > self._before:
            seconds = now - self._before
            share = 1 - math.exp(-seconds / (_HORIZON * self.target_ms / 1e3))
            self.rate += share * (max(waiting - self._left, 0) / seconds - self.rate)
        self._before, self._left = now, waiting
