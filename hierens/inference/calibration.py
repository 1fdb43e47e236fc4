"""Thresholds for a budget or an accuracy, and temperatures, chosen on held-out images.

Both are computed from a `CalibrationSet`, which `collect` makes in one pass over labelled images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.core.labels import as_indices, check_classes, out_of_range
from hierens.core.modes import evaluating
from hierens.core.protocol import AdaptiveModel
from hierens.core.tree import nested_sizes
from hierens.evaluation.profiling import call_ms
from hierens.evaluation.uncertainty import Measure, certainty
from hierens.inference.confidence import EVERYBODY, NOBODY, Confidence

# Logarithms of the ratio of the shares of two depths, from all images leaving at the first depth to all at the last.
_LOWEST, _HIGHEST = -30.0, 30.0
_LOG_RATIOS = (_LOWEST, *(step / 40 for step in range(-400, 401)), _HIGHEST)
# Timed calls per depth: at least the first number, then until the time is up, at most the second.
_LEAST_CALLS, _MOST_CALLS, _SECONDS = 20, 200, 0.2
TAIL = 0.95  # of `p95_milliseconds`


@dataclass(frozen=True)
class CalibrationSet:
    """Predictions of every depth for labelled images.

    Attributes:
        logits: of the nested ensembles, (N, depths, classes).
        votes: the class that each network predicts, (N, leaves).
        labels: (N,).
        macs: of every depth, per image.
        sizes: networks (or exits) of every depth; by default those of a tree.
        times: milliseconds of single images that leave at each depth, (depths, repeats), ascending in both directions;
            None if not measured.
    """

    logits: Tensor
    votes: Tensor
    labels: Tensor
    macs: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    times: Tensor | None = None

    @cached_property
    def milliseconds(self) -> tuple[float, ...]:
        """Median time of one image that leaves at each depth; empty if it was not measured."""
        return () if self.times is None else tuple(self.times.double().quantile(0.5, dim=1).tolist())

    def halves(self, seed: int = 0) -> tuple[CalibrationSet, CalibrationSet]:
        """Two sets of different images, drawn at random, with half of the images of every class in each.

        Raises:
            ValueError: there are fewer than two images.
        """
        if len(self.labels) < 2:
            raise ValueError(f"two halves need at least 2 labelled images, got {len(self.labels)}.")
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        order = order[self.labels[order].argsort(stable=True)]
        one, other = (
            replace(self, logits=self.logits[rows], votes=self.votes[rows], labels=self.labels[rows])
            for rows in (order[::2], order[1::2])
        )
        return one, other

    def certainties(self, measure: Measure) -> Tensor:
        """Certainty of the prediction of every depth, (N, depths): see `hierens.evaluation.uncertainty.certainty`."""
        sizes = self.sizes or nested_sizes(self.votes.shape[1])
        columns = [certainty(self.logits[:, b], self.votes[:, :n], measure) for b, n in enumerate(sizes)]
        return torch.stack(columns, 1)


@torch.no_grad()
def collect(model: AdaptiveModel, batches: Iterable[tuple[Tensor, Tensor]], *, timed: bool = False) -> CalibrationSet:
    """Predictions of every depth, from one pass over all networks, in evaluation mode.

    Args:
        model: the ensemble.
        batches: images (N, C, H, W) and class indices (N,); images with a negative index are skipped.
        timed: also measure how long one image takes that leaves at each depth, on the model's device.

    Raises:
        ValueError: there are no labelled images, or a label is not one of the model's classes.
    """
    check_classes(model, "calibration")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    device = next(model.parameters()).device
    size: tuple[int, ...] = ()
    with evaluating(model):
        for images, labels in batches:
            size, labels = tuple(images.shape[1:]), as_indices(labels, "a batch")
            if len(wrong := (labels >= model.num_classes).nonzero()):
                raise out_of_range(int(wrong[0]), int(labels[wrong[0]]), model.num_classes, "a batch")
            known = labels >= 0
            leaf_logits = model(images.to(device), reduce=False).cpu()[known]
            parts.append((model.prediction_weights.cpu()(leaf_logits), leaf_logits.argmax(-1), labels[known]))
        if not sum(len(labels) for *_, labels in parts):
            raise ValueError("there is nothing to calibrate on: no labelled image was seen.")
        logits, votes, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        times = _times(model, size) if timed else None
        return CalibrationSet(logits, votes, labels, model.macs(size), model.sizes, times)


def calibrate(
    model: AdaptiveModel,
    batches: Iterable[tuple[Tensor, Tensor]] | CalibrationSet,
    budget: float | None = None,
    measure: Measure = "probability",
    *,
    milliseconds: float | None = None,
    p95_milliseconds: float | None = None,
    accuracy: float | None = None,
) -> Confidence:
    """Thresholds for a cost per image (budgeted batch classification), or for an accuracy at the lowest cost.

    The method is that of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844): at each depth, the images with the most
    certain predictions leave. Their shares of all images fall or rise geometrically from depth to depth. The ratio is
    found by bisection so that the mean cost on the held-out images meets the budget. For an accuracy, it is the first
    of 803 ratios, in the order of cost, with which the held-out images are classified that accurately.

    Args:
        model: the ensemble.
        batches: held-out images and labels, or the result of `collect`.
        budget: mean multiply-accumulates per image.
        measure: of certainty.
        milliseconds: instead of a budget of multiply-accumulates, the mean time of single images, which is measured on
            the model's device; from a `CalibrationSet`, it takes the times that `collect(..., timed=True)` measured.
        p95_milliseconds: instead of a mean, the 95th percentile of the times of single images, measured likewise.
        accuracy: instead of a budget, the accuracy on the held-out images in percent.

    Returns:
        The policy. On images like the held-out ones, its mean cost is the budget; an accuracy will be a little lower,
        since the thresholds were chosen for these images (see `hierens.inference.expectation`).

    Raises:
        ValueError: not exactly one target; a budget below the cost of the first depth or above that of the last; an
            accuracy that no ratio reaches; no measured times; or a model of one depth.
    """
    if sum(target is not None for target in (budget, milliseconds, p95_milliseconds, accuracy)) != 1:
        raise ValueError(f"give one of {budget=}, {milliseconds=}, {p95_milliseconds=} and {accuracy=}.")
    timed = milliseconds is not None or p95_milliseconds is not None
    held_out = batches if isinstance(batches, CalibrationSet) else collect(model, batches, timed=timed)
    _check_depths(held_out)
    certainties = held_out.certainties(measure)
    if accuracy is not None:
        return Confidence(_for_accuracy(held_out, certainties, accuracy), measure)
    if budget is not None:
        return Confidence(_for_budget(certainties, held_out.macs, budget, "MACs"), measure)
    if held_out.times is None:
        raise ValueError("times were not measured with this calibration set: use collect(..., timed=True).")
    if p95_milliseconds is not None:
        return Confidence(_for_tail(certainties, held_out.times, p95_milliseconds), measure)
    assert milliseconds is not None
    return Confidence(_for_budget(certainties, held_out.milliseconds, milliseconds, "milliseconds"), measure)


def budgeted_batch(held_out: CalibrationSet, shares: Sequence[float]) -> list[Confidence]:
    """Policies for a curve of accuracy against mean cost: the rule of `calibrate` with one budget after the other.

    MSDNet lets the share z q (1 - q)^(k - 1) of the images leave at exit k, where z makes the sum 1, and varies q. A
    budget determines the ratio 1 - q. Above a certain budget, the ratio exceeds 1, as it does in the authors' code.
    `hierens.inference.expectation.expectation` evaluates a policy on other images.

    Args:
        held_out: the result of `collect`.
        shares: budgets, from the cost of the first depth (0) to full cost (1).

    Raises:
        ValueError: a share outside 0 to 1, or a model of one depth.
    """
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"shares must be from 0 (cost of the first depth) to 1 (full cost), got {wrong[0]:g}.")
    _check_depths(held_out)
    certainties, macs = held_out.certainties("probability"), held_out.macs
    budgets = (macs[0] + share * (macs[-1] - macs[0]) for share in shares)
    return [Confidence(_for_budget(certainties, macs, budget, "MACs")) for budget in budgets]


def _check_depths(held_out: CalibrationSet) -> None:
    if len(held_out.macs) < 2:
        raise ValueError("the model has a single depth, so there are no thresholds to choose.")


def _for_budget(certainties: Tensor, costs: Sequence[float], budget: float, unit: str) -> tuple[float, ...]:
    """The thresholds with the highest mean cost that is not above the budget."""
    least, most = costs[0], costs[-1]
    if not least <= budget <= most:
        raise ValueError(f"the budget must be from {least:.3g} to {most:.3g} {unit} per image, got {budget:.3g}.")
    return _deepest(certainties, lambda thresholds: mean_cost(certainties, thresholds, costs) <= budget)


def _for_tail(certainties: Tensor, times: Tensor, limit: float) -> tuple[float, ...]:
    """The thresholds with the highest mean cost and a 95th percentile of the times that is not above the limit."""
    least, most = (float(tail(row, torch.ones_like(row))) for row in (times[:1], times[-1:]))
    if not least <= limit <= most:
        raise ValueError(
            f"the 95th percentile must be from {least:.3g} milliseconds, if all images leave at depth 0, to "
            f"{most:.3g}, if none leaves early, got {limit:.3g}."
        )

    def holds(thresholds: Sequence[float]) -> bool:
        return float(tail(times, exits(certainties, thresholds).bincount(minlength=len(times))[:, None])) <= limit

    return _deepest(certainties, holds)


def tail(times: Tensor, weights: Tensor) -> Tensor:
    """95th percentile of measured times, given their weights.

    Args:
        times: (depths, repeats).
        weights: (..., depths, repeats), or (..., depths, 1) if all times of a depth have the same.

    Returns:
        The smallest of the times up to which 95 % of the weights are, (...).
    """
    order = times.flatten().argsort()
    weights = weights.double().expand(*weights.shape[:-1], times.shape[1])
    reached = weights.flatten(-2)[..., order].cumsum(-1)
    first = (reached >= TAIL * reached[..., -1:] - 1e-9).int().argmax(-1)
    return times.flatten()[order][first]


def _deepest(certainties: Tensor, holds: Callable[[tuple[float, ...]], bool]) -> tuple[float, ...]:
    """The thresholds of the largest ratio of shares that holds, by bisection."""
    low, high = _LOWEST, _HIGHEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(_thresholds(certainties, middle)) else (low, middle)
    return _thresholds(certainties, low)


def _for_accuracy(held_out: CalibrationSet, certainties: Tensor, accuracy: float) -> tuple[float, ...]:
    """The cheapest thresholds with an accuracy. It can fall again where more is computed, so there is no bisection."""
    if not 1 < accuracy <= 100:
        raise ValueError(f"the accuracy must be in percent, above 1 and at most 100, got {accuracy:g}.")
    right = (held_out.logits.argmax(-1) == held_out.labels[:, None]).double()
    best = 0.0
    for log_ratio in _LOG_RATIOS:
        thresholds = _thresholds(certainties, log_ratio)
        reached = 100 * float(right.gather(1, exits(certainties, thresholds)[:, None]).mean())
        if reached >= accuracy - 1e-9:
            return thresholds
        best = max(best, reached)
    raise ValueError(
        f"the accuracy must be at most {math.floor(100 * best) / 100:.2f} %, the best that thresholds reach on these "
        f"{len(right):,} images, got {accuracy:g} %."
    )


def _times(model: AdaptiveModel, size: tuple[int, ...]) -> Tensor:
    """Milliseconds of an image (C, H, W) that leaves at each depth, (depths, repeats), each row sorted.

    Depths take turns, so that other work on the machine affects all alike. No time falls from one depth to the next.
    """
    parameter = next(model.parameters())
    image = torch.randn(1, *size, device=parameter.device, dtype=parameter.dtype)
    calls = [
        partial(Confidence(((NOBODY,) * depth + (EVERYBODY,))[: max(model.depths - 1, 1)]), model, image)
        for depth in range(model.depths)
    ]
    for call in calls * 2:
        call()  # warm-up: the first calls create kernels and caches
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < _LEAST_CALLS or (
        len(rounds) < _MOST_CALLS and time.perf_counter() - start < _SECONDS * model.depths
    ):
        rounds.append([call_ms(call, image.device, 0.0) for call in calls])
    return torch.tensor(rounds).T.sort(1).values.cummax(0).values


def exits(certainties: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The depth at which each image leaves, (N,), given the certainties of all depths, (N, depths)."""
    return (certainties >= torch.tensor([*thresholds, EVERYBODY], dtype=certainties.dtype)).int().argmax(1)


def mean_cost(certainties: Tensor, thresholds: Sequence[float], costs: Sequence[float]) -> float:
    """Mean cost per image, given the cost of every depth."""
    return float(torch.tensor(costs, dtype=torch.float64)[exits(certainties, thresholds)].mean())


def _thresholds(certainties: Tensor, log_ratio: float) -> tuple[float, ...]:
    """Thresholds with which shares of the images proportional to exp(log_ratio * depth) leave at each depth."""
    count, depths = certainties.shape
    weights = torch.softmax(log_ratio * torch.arange(depths, dtype=torch.float64), 0)
    remaining, found = torch.ones(count, dtype=torch.bool), []
    for depth in range(depths - 1):
        here = certainties[remaining, depth].sort(descending=True).values
        leaving = min(round(float(weights[depth]) * count), len(here))
        # Halfway between the last image that leaves and the first that stays, so that rounding changes neither.
        if leaving == 0:
            threshold = NOBODY
        elif leaving == len(here):
            threshold = EVERYBODY
        else:
            threshold = float(here[leaving - 1] + here[leaving]) / 2
        found.append(threshold)
        remaining &= ~(certainties[:, depth] >= threshold)
    return tuple(found)


@dataclass(frozen=True)
class Temperatures:
    """Temperature scaling: the logits of each depth are divided by its temperature (Guo et al., ICML 2017).

    Attributes:
        values: one per depth.
    """

    values: tuple[float, ...]

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """Probabilities (N, classes) from the logits of a depth, (N, classes)."""
        return F.softmax(logits / self.values[depth], dim=-1)


def fit_temperatures(held_out: CalibrationSet) -> Temperatures:
    """The temperature of every depth with the lowest negative log-likelihood on held-out images."""
    return Temperatures(tuple(_fit(logits, held_out.labels) for logits in held_out.logits.unbind(1)))


def _fit(logits: Tensor, labels: Tensor) -> float:
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits.double() / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_temperature.detach().exp())
