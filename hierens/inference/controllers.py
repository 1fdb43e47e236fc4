"""Policies that adapt to the machine while they run: `Deadline` to the time of a step, `Load` to the queue."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hierens.core.protocol import AdaptiveModel
from hierens.inference.policy import (
    FixedDepth,
    Policy,
    Prediction,
    check_evaluating,
    check_positive,
    check_whole,
    same_cost,
)

LARGEST_WINDOW = 10_000  # latencies, which are sorted for every observation


class SharedState:
    """State of a policy behind a lock, because threads share policies. A copy has its own lock and values."""

    def __init__(self, values: dict[Any, Any] | None = None) -> None:
        self.values, self.lock = values or {}, threading.RLock()

    def __reduce__(self) -> tuple[type[SharedState], tuple[dict[Any, Any]]]:
        with self.lock:
            return type(self), (copy.deepcopy(self.values),)


class _StepTime(NamedTuple):
    """Mean time of a step and its mean deviation, in seconds."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Deadline(Policy):
    """Evaluates as many networks as fit into a time: leaf by leaf, while the next leaf is expected to finish in time.

    The mean time of a step and its mean deviation are estimated during use, for each shape of the batch and each leaf,
    by the moving averages with which TCP estimates its retransmission timeout (RFC 6298). If the last steps took longer
    than usual, because other work ran between them, the expected time of the next step is increased in proportion. The
    first leaf is always evaluated. The last leaf that is started may finish late, by no more than its own time.

    Args:
        milliseconds: from the call to the prediction, unless `within` gets another time.
        caution: mean deviations of a step's time that must fit into the time as well.

    Raises:
        ValueError: a time or a caution that is not positive.
    """

    milliseconds: float
    caution: float = 4.0
    kind: ClassVar[str] = "deadline"
    _learned: SharedState = field(default_factory=SharedState, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.milliseconds is None or self.caution is None:
            raise ValueError("milliseconds and caution must be positive, got None.")
        check_positive(self, "milliseconds", "caution")

    def learn(self, model: AdaptiveModel, example: Tensor, repeats: int = 10) -> None:
        """Measure all steps for the example's batch size before requests arrive.

        Args:
            model: the ensemble that will be called.
            example: images (N, C, H, W).
            repeats: evaluations of all leaves, after one warm-up.
        """
        self.within(model, example, float("inf"))
        with self._learned.lock:
            for known in [step for step in self._learned.values if step[:-1] == example.shape]:
                del self._learned.values[known]
        for _ in range(repeats):
            self.within(model, example, float("inf"))

    @torch.no_grad()
    def within(self, model: AdaptiveModel, images: Tensor, milliseconds: float | None = None) -> Prediction:
        """Predict within another time than the policy's own.

        Raises:
            ValueError: the model is in training mode.
        """
        check_evaluating(model)
        limit = (self.milliseconds if milliseconds is None else milliseconds) / 1e3
        start = before = time.perf_counter()
        slowdown = 1.0
        for step in model.anytime(images):
            if images.is_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            slowdown = self._record((*images.shape, step.leaves), now - before, slowdown)
            before = now
            mean, deviation = self._learned.values.get((*images.shape, step.leaves + 1), _StepTime(now - start, 0.0))
            expected = mean * slowdown + self.caution * deviation
            if step.leaves == model.leaves or now - start + expected > limit:
                break
        return same_cost(model, images, step.logits, step.leaves)

    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        return self.within(model, images)

    def _record(self, step: tuple[int, ...], seconds: float, slowdown: float) -> float:
        """Update the estimates with the time of a step, and return the current slowdown, which is at least 1."""
        with self._learned.lock:
            mean, deviation = self._learned.values.get(step, _StepTime(seconds, seconds / 2))
            error = seconds - mean
            self._learned.values[step] = _StepTime(mean + error / 8, deviation + (abs(error) - deviation) / 4)
        return max(1.0, 0.5 * slowdown + 0.5 * seconds / mean)


@dataclass(frozen=True)
class Load(Policy):
    """Lowers the depth while requests queue up or latencies exceed a target, and raises it again when the load falls.

    The depth falls by one as soon as the queue exceeds `queue_high`, or the 99th percentile of the latest latencies
    exceeds the target. It rises by one after `patience` observations in which the queue was at most `queue_low` and
    latencies were below `relax` times the target. The lower and upper thresholds differ so that the depth does not
    oscillate (hysteresis).

    Args:
        max_depth: depth without load.
        target_ms: for the 99th percentile of latencies; None uses the queue alone.
        queue_high: number of waiting requests above which the depth falls.
        queue_low: number of waiting requests up to which the depth may rise.
        relax: share of the target below which latencies let the depth rise.
        patience: observations without load before the depth rises, and between two falls because of latency.
        window: number of latencies from which the percentile is computed.

    Raises:
        ValueError: thresholds in the wrong order, or out of range.
    """

    max_depth: int
    target_ms: float | None = None
    queue_high: int = 8
    queue_low: int = 1
    relax: float = 0.6
    patience: int = 20
    window: int = 100
    kind: ClassVar[str] = "load"
    _state: SharedState = field(default_factory=SharedState, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole(self, 0, "max_depth", "queue_high", "queue_low")
        check_whole(self, 1, "patience")
        check_whole(self, 1, "window", most=LARGEST_WINDOW)
        check_positive(self, "target_ms", "relax")
        if not self.queue_low < self.queue_high:
            raise ValueError(f"queue_low must be below queue_high, got {self.queue_low} and {self.queue_high}.")
        if not self.relax < 1:
            raise ValueError(f"relax must be between 0 and 1, got {self.relax}.")
        latencies: deque[float] = deque(maxlen=self.window)
        self._state.values.update(depth=self.max_depth, calm=0, since=self.patience, latencies=latencies)

    @property
    def depth(self) -> int:
        """The current depth."""
        return int(self._state.values["depth"])

    def observe(self, queue: int, latency_ms: float | None = None) -> int:
        """Record the load.

        Args:
            queue: number of waiting requests.
            latency_ms: of a request that was just completed, from its arrival.

        Returns:
            The new depth.
        """
        with self._state.lock:
            self._record(self._state.values, queue, latency_ms)
            return self.depth

    def _record(self, state: dict[str, Any], queue: int, latency_ms: float | None) -> None:
        state["since"] += 1
        late = 0.0
        if latency_ms is not None and self.target_ms is not None:
            state["latencies"].append(latency_ms)
            ordered = sorted(state["latencies"])
            late = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] / self.target_ms
        if queue > self.queue_high or (late > 1 and state["since"] > self.patience):
            self._change(-1)
        elif queue <= self.queue_low and late < self.relax:
            state["calm"] += 1
            if state["calm"] >= self.patience:
                self._change(+1)
        else:
            state["calm"] = 0

    def _change(self, by: int) -> None:
        state = self._state.values
        state["depth"] = min(max(state["depth"] + by, 0), self.max_depth)
        state["calm"] = state["since"] = 0
        state["latencies"].clear()  # they were measured at the previous depth

    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        return FixedDepth(self.depth)._predict(model, images)
