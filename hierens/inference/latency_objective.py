"""A controller that holds a latency and an agreement with the full ensemble while load and images change."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hierens.core.json_files import is_finite, is_whole, short
from hierens.core.protocol import AdaptiveModel
from hierens.evaluation.uncertainty import Measure, check_measure
from hierens.inference.calibration import CalibrationSet
from hierens.inference.confidence import Confidence
from hierens.inference.controllers import LARGEST_WINDOW, SharedState
from hierens.inference.operating_points import OperatingPoint, batch_ms, depth_times, operating_points
from hierens.inference.planner import Planner
from hierens.inference.policy import Policy, Prediction, check_evaluating, check_positive, check_table, check_whole
from hierens.inference.running_agreement import RunningAgreement

Rows = tuple[tuple[float, ...], ...]

_LOG = logging.getLogger(__name__)
_SHADOW_BATCH = 8  # images; single ones cost several times as much
_REFIT = 24  # shadowed images between two re-fits
_MOST_PENDING = 64  # images kept for the shadow
_UNSURE = 4  # times as many are kept while the agreement is unknown or below half-way to the bound


@dataclass(frozen=True)
class LatencyObjective(Policy):
    """Chooses batch size, maximal depth and thresholds together, for a percentile of latencies.

    A server asks `batch_size` for every batch, with the number of waiting images and the age of the oldest. Of all
    operating points (thresholds, maximal depth, batch size) whose expected latency is within the target, including the
    time in the queue at the present rate of arrivals, it chooses the one with the highest expected agreement with the
    full ensemble; if there is none, the cheapest. The server reports latencies to `observe`, which adapts the share of
    the target that may be planned until the percentile is met (quantile tracking, as Gibbs and Candes, NeurIPS 2021).

    Every so many images, one is kept, and evaluated by all networks when `shadow` is called and there is time. So the
    agreement is known while serving. Four times as many are kept until it is known, also after a drift, and while it is
    below half-way from the bound to all. Operating points are fitted anew on the recent of these images. If the
    agreement is significantly below what was expected and half-way from all to the bound, or above what was expected
    (drift), older images are forgotten.

    Make it with `from_calibration`, call `learn` on the machine that serves, and save it like any policy: the learned
    times and the recent images' predictions are saved as well.

    Args:
        target_ms: for the latency of a request from its arrival.
        agreement: bound of the share of images whose class is that of the full ensemble.
        certainties: of the prediction of every depth, for each image on which the points are fitted, (N, depths).
        classes: predicted at every depth for these images, (N, depths).
        times_ms: to every depth (columns) of batches of 1, 2, 4, ... images (rows), as measured by `learn`.
        percentile: of latencies that should be within the target.
        max_batch: maximal batch size, a power of two.
        shadow_share: share of images that are also evaluated by all networks; four times as many at times.
        window: maximal number of images on which the points are fitted.
        measure: of certainty.

    Raises:
        ValueError: a value is out of range, or the rows do not fit together.
    """

    target_ms: float
    agreement: float
    certainties: Rows = field(repr=False, compare=False)
    classes: Rows = field(repr=False, compare=False)
    times_ms: Rows = field(default=(), repr=False, compare=False)
    percentile: float = 99.0
    max_batch: int = 32
    shadow_share: float = 0.04
    window: int = 500
    measure: Measure = "probability"
    kind: ClassVar[str] = "latency"
    _state: SharedState = field(default_factory=SharedState, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        for name in ("certainties", "classes", "times_ms"):
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))
        rows = deque(zip(self.certainties, self.classes, strict=True), maxlen=self.window)
        state = {
            "planner": Planner(self.target_ms, self.percentile, self.agreement, self.times_ms),
            "rows": rows,
            "fresh": 0,
        }
        state |= {"running": RunningAgreement(), "pending": deque(maxlen=_MOST_PENDING)}
        counts = dict.fromkeys(("images", "shadowed", "refits", "drifts", "busy_s", "shadow_s"), 0)
        self._state.values.update(state, **counts)
        if self.times_ms:
            self._fit()

    @classmethod
    def from_calibration(
        cls,
        held_out: CalibrationSet,
        target_ms: float,
        agreement: float,
        measure: Measure = "probability",
        **settings: Any,
    ) -> LatencyObjective:
        """The controller whose first points are fitted on held-out images; their labels are not used.

        Args:
            held_out: the result of `hierens.inference.calibration.collect`; of more images than the window, some are
                drawn at random.
            target_ms: see the class.
            agreement: see the class.
            measure: of certainty.
            settings: other arguments of the class.
        """
        rows = torch.randperm(len(held_out.labels), generator=torch.Generator().manual_seed(0))
        rows = rows[: settings.get("window", cls.window)]
        certainties, classes = _rows(held_out, measure)
        chosen = [tuple(table[row] for row in rows.tolist()) for table in (certainties, classes)]
        return cls(target_ms, agreement, chosen[0], chosen[1], measure=measure, **settings)

    @torch.no_grad()
    def learn(self, model: AdaptiveModel, example: Tensor, repeats: int = 5) -> None:
        """Measure the time to every depth for all batch sizes; call it on the machine that serves, before it does.

        Args:
            model: the ensemble that will be called.
            example: one or more images (N, C, H, W).
            repeats: evaluations of all leaves for each batch size, after one warm-up; the medians are used.
        """
        self._check_model(model)
        sizes = (2**k for k in range(self.max_batch.bit_length()))
        times = tuple(depth_times(model, example[torch.arange(size) % len(example)], repeats) for size in sizes)
        with self._state.lock:
            self._planner.replace_times(times)
            self._fit()

    def batch_size(self, waiting: int, oldest_ms: float = 0.0) -> int:
        """Choose the operating point of the next batch.

        Args:
            waiting: number of waiting images, with those of the next batch.
            oldest_ms: time since the arrival of the oldest.

        Returns:
            The largest number of images to predict in the next call.
        """
        with self._state.lock:
            self._check_learned()
            return self._planner.plan(waiting, oldest_ms)

    def observe(self, latencies_ms: Sequence[float]) -> None:
        """Record the latencies of completed requests, from their arrival."""
        with self._state.lock:
            self._planner.observe(latencies_ms)

    def shadow(self, model: AdaptiveModel, waiting: int = 0, oldest_ms: float = 0.0) -> int:
        """Evaluate some of the kept images with all networks, if enough are kept and the target leaves time for it.

        Args:
            model: the ensemble.
            waiting: number of waiting images.
            oldest_ms: time since the arrival of the oldest.

        Returns:
            The number of images that were evaluated.
        """
        with self._state.lock:
            state = self._state.values
            self._check_learned()
            taken = batch_ms(self._planner.times_ms, (1.0,) * self._depths, _SHADOW_BATCH) * self._planner.slowdown
            if len(state["pending"]) < _SHADOW_BATCH or not self._planner.fits(taken, waiting, oldest_ms):
                return 0
            kept = [state["pending"].popleft() for _ in range(_SHADOW_BATCH)]
        kept = [one for one in kept if one[0].shape == kept[0][0].shape]
        start = time.perf_counter()
        with torch.no_grad():
            leaf_logits = model(torch.stack([image for image, *_ in kept]), reduce=False).cpu()
            logits = model.prediction_weights.cpu()(leaf_logits)
        full = CalibrationSet(logits, leaf_logits.argmax(-1), torch.zeros(len(kept)), (), model.sizes)
        with self._state.lock:
            self._record_shadow(list(zip(*_rows(full, self.measure), strict=True)), kept)
            state["shadow_s"] += time.perf_counter() - start
        return len(kept)

    def metrics(self) -> dict[str, float]:
        """Plain numbers by name, for monitoring."""
        with self._state.lock:
            state, planner = self._state.values, self._planner
            low, mean, high = state["running"].interval()
            return {
                **{name: float(state[name]) for name in ("shadowed", "refits", "drifts", "busy_s", "shadow_s")},
                **{
                    name: float(getattr(planner, name))
                    for name in ("rate", "margin", "aim", "slowdown", "batch", "overloaded")
                },
                "agreement": mean,
                "agreement_low": low,
                "agreement_high": high,
                "expected_agreement": planner.point.agreement if planner.point else math.nan,
                "depth": planner.point.depth if planner.point else math.nan,
            }

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the learned times and the recent images, which `from_dict` reads."""
        with self._state.lock:
            values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            certainties, classes = zip(*self._state.values["rows"], strict=True)
            rows = {"certainties": certainties, "classes": classes, "times_ms": self._planner.times_ms}
        lists = {name: [list(row) for row in table] for name, table in rows.items()}
        return {"policy": self.kind, **values, **lists}

    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        self._check_model(model)
        with self._state.lock:
            point = self._check_learned()
        start = time.perf_counter()
        found = Confidence(point.thresholds, self.measure)._predict(model, images)
        if images.is_cuda:
            torch.cuda.synchronize()
        self._record(point, images, found.logits.argmax(-1), time.perf_counter() - start)
        return found

    def _record(self, point: OperatingPoint, images: Tensor, classes: Tensor, seconds: float) -> None:
        """Update the moving averages with a batch, and keep some of its images for the shadow."""
        with self._state.lock:
            state = self._state.values
            unsure = state["running"].unsure(self._planner.half_way)
            every = round(1 / min(self.shadow_share * (_UNSURE if unsure else 1), 1))
            self._planner.completed(point, len(images), 1e3 * seconds)
            for row in range(-state["images"] % every, len(images), every):
                state["pending"].append((images[row].clone(), int(classes[row]), point.agreement))
            state["images"] += len(images)
            state["busy_s"] += seconds

    def _record_shadow(self, rows: list[Any], kept: list[Any]) -> None:
        state = self._state.values
        for row, (_, predicted, expected) in zip(rows, kept, strict=True):
            state["rows"].append(row)
            state["running"].add(predicted == row[1][-1], expected)
            self._planner.compare(predicted == row[1][-1], expected)
        state["shadowed"] += len(rows)
        state["fresh"] += len(rows)
        if state["running"].drifted(self._planner.half_way):
            _LOG.info(
                "drift: agreement from %.4f over %.4f to %.4f, expected %.4f, bound %.4f",
                *(*state["running"].interval(), state["running"].expected / state["running"].weight, self.agreement),
            )
            recent = int(state["running"].weight / 2)
            state["rows"] = deque(list(state["rows"])[-recent:], maxlen=self.window)
            state.update(running=RunningAgreement(), drifts=state["drifts"] + 1, fresh=_REFIT)
        if state["fresh"] >= _REFIT:
            self._fit()

    def _fit(self) -> None:
        state = self._state.values
        certainties, classes = (torch.tensor(rows) for rows in zip(*state["rows"], strict=True))
        points = operating_points(certainties, classes, self._planner.times_ms)
        point = self._planner.replace_points(points)
        state.update(fresh=0, refits=state["refits"] + 1)
        _LOG.info(
            "re-fit on %d images: %d operating points, expected agreement %.4f to %.4f; now %.4f with thresholds %s",
            *(len(classes), len(points), points[-1].agreement, points[0].agreement, point.agreement),
            [round(t, 3) for t in point.thresholds],
        )

    @property
    def _planner(self) -> Planner:
        planner: Planner = self._state.values["planner"]
        return planner

    @property
    def _depths(self) -> int:
        return len(self.classes[0])

    def _check_model(self, model: AdaptiveModel) -> None:
        check_evaluating(model)
        if model.depths != self._depths:
            raise ValueError(f"this policy was calibrated for {self._depths} depths, and the model has {model.depths}.")

    def _check_learned(self) -> OperatingPoint:
        if self._planner.point is None:
            raise ValueError("the times of this policy were not measured: call policy.learn(model, images) first.")
        return self._planner.point


def _rows(predictions: CalibrationSet, measure: Measure) -> tuple[Rows, Rows]:
    """Certainties, rounded so that they are short in JSON, and classes, each (N, depths)."""
    certainties = predictions.certainties(measure).tolist()
    rounded = tuple(tuple(round(value, 5) for value in row) for row in certainties)
    return rounded, tuple(map(tuple, predictions.logits.argmax(-1).tolist()))


def _check(policy: LatencyObjective) -> None:
    """Refuse values out of range, and tables that do not fit together."""
    for name in ("target_ms", "agreement", "percentile", "max_batch", "shadow_share", "window"):
        if getattr(policy, name) is None:
            raise ValueError(f"{name} must be a number, got None.")
    check_positive(policy, "target_ms")
    check_whole(policy, 1, "max_batch", most=2**12)
    check_whole(policy, 1, "window", most=LARGEST_WINDOW)
    for name, least, most in (("agreement", 0, 1), ("percentile", 50, 99.99), ("shadow_share", 1e-4, 1)):
        if not is_finite(value := getattr(policy, name), least, most):
            raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {short(value)}.")
    if policy.max_batch & (policy.max_batch - 1):
        raise ValueError(f"max_batch must be a power of two, got {policy.max_batch}.")
    check_measure(policy.measure)
    depths = check_table(policy, "certainties", lambda value: is_finite(value, 0, 1))
    rows = len(policy.certainties)
    if depths < 2 or rows > policy.window:
        raise ValueError(
            f"certainties must be 1 to {policy.window} rows (the window) of two depths or more, got {rows}."
        )
    if (check_table(policy, "classes", lambda value: is_whole(value, 0, 10**6)), len(policy.classes)) != (depths, rows):
        raise ValueError(f"classes must be {rows} rows of {depths}, as the certainties.")
    sizes = policy.max_batch.bit_length()
    measured = check_table(policy, "times_ms", lambda value: is_finite(value, 1e-9))
    if policy.times_ms and (measured, len(policy.times_ms)) != (depths, sizes):
        raise ValueError(
            f"times_ms must be {sizes} rows of {depths}: one per batch of 1, 2, 4, ... {policy.max_batch}."
        )
