"""What thresholds cost and how accurate they are, estimated on images that were not used to choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hierens.core.tree import nested_sizes
from hierens.inference.calibration import CalibrationSet, exits, tail
from hierens.inference.confidence import Confidence

_RESAMPLES = 1000  # of the bootstrap


class Estimate(NamedTuple):
    """A mean over images and its standard error; the error is 0 for a single image."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The estimate from one value per image, (N,).

        Examples:
            >>> Estimate.of(torch.tensor([1.0, 3.0]))
            Estimate(mean=2.0, error=1.0)
        """
        error = float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0
        return cls(float(values.double().mean()), error)


@dataclass(frozen=True)
class Expectation:
    """Accuracy and cost per image, with standard errors over the images.

    Attributes:
        images: their number.
        accuracy: in percent. Its standard error is computed with two right and two wrong images added (Agresti and
            Coull, 1998), so that it is not 0 if all predictions are right.
        leaves: networks (or exits) evaluated.
        macs: multiply-accumulates.
        milliseconds: mean for single images, if the calibration set has measured times. The standard error is a
            bootstrap's (Efron, 1979), over the images and over the measured times.
        p95_milliseconds: 95th percentile for single images, likewise.
    """

    images: int
    accuracy: Estimate
    leaves: Estimate
    macs: Estimate
    milliseconds: Estimate | None = None
    p95_milliseconds: Estimate | None = None


def expectation(held_out: CalibrationSet, policy: Confidence) -> Expectation:
    """The accuracy and cost of a policy on labelled images.

    Args:
        held_out: images that were not used to choose the thresholds: see `CalibrationSet.halves`.
        policy: with a threshold for every depth below the full one, as `calibrate` returns it.
    """
    return _expectation(held_out, exits(held_out.certainties(policy.measure), policy.thresholds))


def expectations_of_depths(held_out: CalibrationSet) -> list[Expectation]:
    """The accuracy and cost of every depth on the same images, if all leave there."""
    count = len(held_out.labels)
    return [_expectation(held_out, torch.full((count,), depth)) for depth in range(len(held_out.macs))]


def _expectation(held_out: CalibrationSet, left: Tensor) -> Expectation:
    """The estimates if the images leave at the given depths, (N,)."""

    def of(costs: Sequence[float]) -> Estimate:
        return Estimate.of(torch.tensor(costs, dtype=torch.float64)[left])

    right = held_out.logits[torch.arange(len(left)), left].argmax(-1) == held_out.labels
    share = (int(right.sum()) + 2) / (len(right) + 4)
    accuracy = Estimate(100 * float(right.double().mean()), 100 * (share * (1 - share) / (len(right) + 4)) ** 0.5)
    sizes = held_out.sizes or nested_sizes(held_out.votes.shape[1])
    times = () if held_out.times is None else _latencies(held_out.times, left)
    return Expectation(len(left), accuracy, of(sizes), of(held_out.macs), *times)


def _latencies(times: Tensor, left: Tensor) -> tuple[Estimate, Estimate]:
    """Mean and 95th percentile of the time, given times (depths, repeats) and the depths at which the images left.

    The mean is that of the median times of the depths. Each resample draws images, and at every depth times, with
    replacement. Only their numbers matter.
    """
    depths, repeats = times.shape
    shares = left.bincount(minlength=depths).double() / len(left)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.multinomial(len(left), shares.numpy(), _RESAMPLES)) / len(left)
    of_times = torch.from_numpy(rng.multinomial(repeats, [1 / repeats] * repeats, (_RESAMPLES, depths))) / repeats
    medians = times.double().gather(1, (of_times.cumsum(2) >= 0.5).int().argmax(2).T).T
    mean = float((shares * times.double().quantile(0.5, dim=1)).sum())
    whole = float(tail(times, shares[:, None]))
    return (
        Estimate(mean, float((images * medians).sum(1).std())),
        Estimate(whole, float(tail(times, images[:, :, None] * of_times).double().std())),
    )
