"""How much to compute for whom: policies that put a hand on the depth.

A policy is called with a model and images and answers with a `Prediction`. It is a frozen set of plain values, so that
it goes into JSON and is saved beside the model (`save_policy`, `load_policy`); what a policy learns while it works (the
speed of this machine, the recent load) is state of its own and is not saved. Threads may share a policy.

- `FixedDepth`: always the same networks.
- `Deadline`: as many networks as fit into a time.
- `Load`: a depth that gives way while requests queue up, and comes back.
- `Confidence`: every image leaves as soon as its answer is sure enough; `hierens.inference.calibration.calibrate`
  chooses the thresholds for a budget.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hierens.core.atomic_files import replacing
from hierens.core.fetching import LoadError, MissingFileError, read_files
from hierens.core.json_files import is_finite, is_whole, read_json, short
from hierens.core.protocol import AdaptiveModel
from hierens.evaluation.uncertainty import MEASURES, Measure, certainty

POLICY = "policy.json"
_LARGEST = 10**6  # of whole numbers
_WIDEST = 10_000  # latencies that are sorted for every answer
_MOST_THRESHOLDS = 4096
NOBODY, EVERYBODY = 2.0, -1.0  # thresholds beyond every certainty, which JSON can hold


@dataclass(frozen=True)
class Prediction:
    """An answer, and what it took.

    Attributes:
        logits: (N, classes).
        leaves: networks (or exits) that answered each image, (N,).
        macs: multiply-accumulates spent on each image, (N,).
    """

    logits: Tensor
    leaves: Tensor
    macs: Tensor


@dataclass(frozen=True)
class Policy(ABC):
    """Decides how many networks answer."""

    kind: ClassVar[str]

    @torch.no_grad()
    def __call__(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        """Answer images (N, C, H, W).

        Raises:
            ValueError: the model is in training mode, or has not the depths that the policy is for.
        """
        _check_evaluating(model)
        return self._answer(model, images)

    @abstractmethod
    def _answer(self, model: AdaptiveModel, images: Tensor) -> Prediction: ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` reads back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"policy": self.kind, **json.loads(json.dumps(values))}


def _check_whole(policy: Policy, least: int, *names: str, most: int = _LARGEST) -> None:
    for name in names:
        value = getattr(policy, name)
        if value is not None and not is_whole(value, least, most):
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {short(value)}.")


def _check_positive(policy: Policy, *names: str) -> None:
    for name in names:
        value = getattr(policy, name)
        if value is not None and not (is_finite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {short(value)}: a finite number above 0.")


def _check_evaluating(model: AdaptiveModel) -> None:
    """Refuse a model in training mode: to change that for one call would change it for other threads, too."""
    if model.training:
        raise ValueError("policies answer in evaluation mode, and the model is in training mode: call model.eval().")


def _uniform(model: AdaptiveModel, images: Tensor, logits: Tensor, leaves: int) -> Prediction:
    """An answer for which every image took the same."""
    cost = model.cost(leaves, tuple(images.shape[1:]))
    of_each = torch.ones(len(images), dtype=torch.int64)
    return Prediction(logits, of_each * leaves, of_each * cost)


@dataclass(frozen=True)
class FixedDepth(Policy):
    """Always the first 2^depth networks, or so many `leaves`; all by default.

    Args:
        depth: of the sub-tree.
        leaves: networks, in place of a depth.

    Raises:
        ValueError: what is no whole number, or both.
    """

    depth: int | None = None
    leaves: int | None = None
    kind: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _check_whole(self, 0, "depth")
        _check_whole(self, 1, "leaves")
        if self.depth is not None and self.leaves is not None:
            raise ValueError(f"give depth or leaves, not both (got depth={self.depth}, leaves={self.leaves}).")

    def _answer(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        leaves = model.leaves_at(self.depth, self.leaves)
        return _uniform(model, images, model(images, leaves=leaves), leaves)


class _State:
    """What a policy keeps in mind, behind a lock: threads share policies. A copy has a lock and values of its own."""

    def __init__(self, values: dict[Any, Any] | None = None) -> None:
        self.values, self.lock = values or {}, threading.RLock()

    def __reduce__(self) -> tuple[type[_State], tuple[dict[Any, Any]]]:
        with self.lock:
            return type(self), (copy.deepcopy(self.values),)


class _Usual(NamedTuple):
    """Seconds that a step takes, and its mean deviation from that."""

    seconds: float
    deviation: float


@dataclass(frozen=True)
class Deadline(Policy):
    """As many networks as fit into a time: leaf by leaf, as long as the next one is expected to be done in time.

    How long a step takes, and how far that strays, is learned by number of images and leaf, as it happens, the way TCP
    learns when to send again (RFC 6298). How much slower than usual the last steps were, since other work came in
    between, stretches what is expected of the next. The first leaf is always evaluated; of the others the last one that
    is begun may come late, by no more than it takes itself.

    Args:
        milliseconds: from the call to the answer, if the call does not say otherwise.
        caution: mean deviations of a step's time for which there must be room as well.

    Raises:
        ValueError: a time or a caution that is not positive.
    """

    milliseconds: float
    caution: float = 4.0
    kind: ClassVar[str] = "deadline"
    _learned: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.milliseconds is None or self.caution is None:
            raise ValueError("milliseconds and caution must be positive, got None.")
        _check_positive(self, "milliseconds", "caution")

    def learn(self, model: AdaptiveModel, example: Tensor, repeats: int = 10) -> None:
        """Measure every step for as many images as the example has, before requests come.

        Args:
            model: the ensemble that will answer.
            example: images (N, C, H, W).
            repeats: walks, after one that warms up.
        """
        self.within(model, example, float("inf"))
        with self._learned.lock:
            for known in [step for step in self._learned.values if step[:-1] == example.shape]:
                del self._learned.values[known]
        for _ in range(repeats):
            self.within(model, example, float("inf"))

    @torch.no_grad()
    def within(self, model: AdaptiveModel, images: Tensor, milliseconds: float | None = None) -> Prediction:
        """Answer within another time than usual.

        Raises:
            ValueError: the model is in training mode.
        """
        _check_evaluating(model)
        limit = (self.milliseconds if milliseconds is None else milliseconds) / 1e3
        start = before = time.perf_counter()
        slowdown = 1.0
        for step in model.anytime(images):
            if images.is_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            slowdown = self._note((*images.shape, step.leaves), now - before, slowdown)
            before = now
            usual, spread = self._learned.values.get((*images.shape, step.leaves + 1), _Usual(now - start, 0.0))
            coming = usual * slowdown + self.caution * spread
            if step.leaves == model.leaves or now - start + coming > limit:
                break
        return _uniform(model, images, step.logits, step.leaves)

    def _answer(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        return self.within(model, images)

    def _note(self, step: tuple[int, ...], taken: float, slowdown: float) -> float:
        """Keep what a step took; how much slower than usual the machine is at the moment, never below 1."""
        with self._learned.lock:
            usual, spread = self._learned.values.get(step, _Usual(taken, taken / 2))
            error = taken - usual
            self._learned.values[step] = _Usual(usual + error / 8, spread + (abs(error) - spread) / 4)
        return max(1.0, 0.5 * slowdown + 0.5 * taken / usual)


@dataclass(frozen=True)
class Load(Policy):
    """A depth that falls while requests queue up or answers come late, and rises again when there is room.

    One step down as soon as the queue exceeds `queue_high` or the 99th percentile of the latest latencies the target;
    one up when the queue stayed at or below `queue_low`, and latencies below `relax` times the target, for `patience`
    observations. The two thresholds lie apart so that the depth does not swing (hysteresis).

    Args:
        max_depth: when there is no load.
        target_ms: of the 99th percentile of latencies; None looks at the queue alone.
        queue_high: waiting requests from which on the depth falls.
        queue_low: waiting requests up to which it may rise.
        relax: share of the target below which latencies let it rise.
        patience: observations without load before it rises, and between two falls for latency.
        window: latencies that the percentile is taken of.

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
    _state: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_whole(self, 0, "max_depth", "queue_high", "queue_low")
        _check_whole(self, 1, "patience")
        _check_whole(self, 1, "window", most=_WIDEST)
        _check_positive(self, "target_ms", "relax")
        if not self.queue_low < self.queue_high:
            raise ValueError(f"queue_low must be below queue_high, got {self.queue_low} and {self.queue_high}.")
        if not self.relax < 1:
            raise ValueError(f"relax must lie between 0 and 1, got {self.relax}.")
        latencies: deque[float] = deque(maxlen=self.window)
        self._state.values.update(depth=self.max_depth, calm=0, since=self.patience, latencies=latencies)

    @property
    def depth(self) -> int:
        """The depth at the moment."""
        return int(self._state.values["depth"])

    def observe(self, queue: int, latency_ms: float | None = None) -> int:
        """Take note of the load.

        Args:
            queue: requests that wait.
            latency_ms: of a request that was just answered, from its arrival.

        Returns:
            The depth from now on.
        """
        with self._state.lock:
            self._note(self._state.values, queue, latency_ms)
            return self.depth

    def _note(self, state: dict[str, Any], queue: int, latency_ms: float | None) -> None:
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
        state["latencies"].clear()  # they tell of the depth before

    def _answer(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        return FixedDepth(self.depth)._answer(model, images)


@dataclass(frozen=True)
class Confidence(Policy):
    """Every image leaves at the first depth at which its answer is sure enough; the batch shrinks on the way.

    After the first 1, 2, 4, ... networks the answer's certainty is compared with that depth's threshold; what is below
    goes on, with the activations that it has. All leave at the last depth.

    Args:
        thresholds: for each depth below the full one, from 0 to 1 whatever the measure; the last one serves all that
            are missing. `NOBODY` (2) lets no image leave at a depth, `EVERYBODY` (-1) all.
        measure: see `hierens.evaluation.uncertainty.certainty`; the networks are those evaluated so far.

    Raises:
        ValueError: no threshold, one that no certainty can be compared with, or another measure; when called, more
            thresholds than the model has depths below the full one.
    """

    thresholds: tuple[float, ...]
    measure: Measure = "probability"
    kind: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        listed = isinstance(self.thresholds, Sequence) and not isinstance(self.thresholds, str)
        if not listed or len(self.thresholds) > _MOST_THRESHOLDS or not all(map(is_finite, self.thresholds)):
            raise ValueError(f"thresholds must be 1 to {_MOST_THRESHOLDS} numbers, got {short(self.thresholds)}.")
        object.__setattr__(self, "thresholds", tuple(float(value) for value in self.thresholds))
        if not self.thresholds:
            raise ValueError(f"thresholds must be at least one number, got {self.thresholds}.")
        if wrong := [value for value in self.thresholds if not 0 <= value <= 1 and value not in (NOBODY, EVERYBODY)]:
            raise ValueError(
                f"thresholds are compared with certainties, which lie from 0 to 1: {wrong[0]} is none (0.9, not 90; "
                f"{NOBODY:g} lets no image leave, {EVERYBODY:g} all)."
            )
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {short(self.measure)}.")

    def _answer(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        sizes = model.sizes
        if len(self.thresholds) > max(len(sizes) - 1, 1):
            raise ValueError(
                f"{len(self.thresholds)} thresholds are for a model of {len(self.thresholds) + 1} depths, and this one "
                f"has {len(sizes)}: give one for each depth below the full one, or fewer: the last serves the rest."
            )
        rows = torch.arange(len(images), device=images.device)
        leaves, macs = torch.zeros(len(images), dtype=torch.int64), torch.zeros(len(images), dtype=torch.int64)
        votes: list[Tensor] = []
        walk = model.anytime(images)
        step = next(walk)
        logits = torch.empty_like(step.logits)
        while True:
            votes.append(step.newest.argmax(-1))
            if step.leaves not in sizes:
                step = next(walk)
                continue
            depth = sizes.index(step.leaves)
            if depth == len(sizes) - 1:
                done = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            else:
                threshold = self.thresholds[min(depth, len(self.thresholds) - 1)]
                done = certainty(step.logits, torch.stack(votes, 1), self.measure) >= threshold
            logits[rows[done]] = step.logits[done]
            leaves[rows[done].cpu()], macs[rows[done].cpu()] = step.leaves, step.macs
            kept = (~done).nonzero().flatten()
            if not len(kept):
                walk.close()
                return Prediction(logits, leaves, macs)
            rows, votes = rows[kept], [vote[kept] for vote in votes]
            step = walk.send(kept) if len(kept) < len(done) else next(walk)


POLICIES: dict[str, type[Policy]] = {kind.kind: kind for kind in (FixedDepth, Deadline, Load, Confidence)}


def from_dict(values: dict[str, Any]) -> Policy:
    """The policy that `to_dict` described.

    Raises:
        ValueError: no policy, or values that it does not take.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a policy is described by fields and values, got {short(values)}.")
    known = POLICIES.get(str(values.get("policy")))
    if known is None:
        raise ValueError(f"there is no policy {short(values.get('policy'))}: choose {', '.join(POLICIES)}.")
    fields = {f.name for f in dataclasses.fields(known) if f.init}
    given = {name: value for name, value in values.items() if name != "policy"}
    if unknown := short(", ".join(sorted(given.keys() - fields)), plain=True):
        raise ValueError(f"a {known.kind} policy takes {', '.join(sorted(fields))}, not {unknown}.")
    try:
        return known(**given)
    except TypeError as error:
        raise ValueError(f"the values of the {known.kind} policy do not fit: {error}.") from error


def save_policy(policy: Policy, directory: str | Path) -> Path:
    """Write `policy.json` beside a saved model."""
    file = Path(directory) / POLICY
    with replacing(file) as partial:
        partial.write_text(json.dumps(policy.to_dict(), indent=2) + "\n")
    return file


def load_policy(
    name: str | Path,
    default: Policy | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Policy:
    """The policy beside a saved model, here or on the Hub, or in a file of its own.

    Args:
        name: a folder, a file, or a repository `user/name`.
        default: what to return if there is a model, but no policy beside it; by default that is an error.
        revision: branch, tag or commit of the repository.
        token: access token of a private repository.
        cache_dir: where downloads are kept.

    Raises:
        LoadError: there is none, or it cannot be read.
    """
    if Path(name).is_file():
        return read_policy(Path(name))
    try:
        return read_files(name, (POLICY,), read_policy, revision=revision, token=token, cache_dir=cache_dir)
    except MissingFileError:
        if default is None:
            raise
        return default


def read_policy(file: Path) -> Policy:
    """The policy in a file.

    Raises:
        LoadError: it cannot be read, holds no policy, or values that the policy does not take.
    """
    values = read_json(file, "a policy")
    if not isinstance(values, dict):
        raise LoadError(f"{file} holds no policy.")
    try:
        return from_dict(values)
    except ValueError as error:
        raise LoadError(f"{file} holds no usable policy: {error}") from error
