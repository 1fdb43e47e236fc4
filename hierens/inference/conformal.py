"""Prediction sets: classes that contain the true one with a chosen probability (split conformal prediction)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hierens.inference.calibration import CalibrationSet


@dataclass(frozen=True)
class PredictionSets:
    """Sets of classes that contain the true class with a probability of at least 1 - alpha.

    Attributes:
        thresholds: per depth, the smallest probability of a class in the set.
        alpha: largest share of images like the held-out ones whose class is outside the set.
    """

    thresholds: tuple[float, ...]
    alpha: float

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """Which classes are in the set, as booleans (N, classes). The most probable class always is."""
        p = F.softmax(logits, dim=-1)
        return (p >= self.thresholds[depth]) | F.one_hot(p.argmax(-1), p.shape[-1]).bool()


def fit_prediction_sets(held_out: CalibrationSet, alpha: float = 0.1) -> PredictionSets:
    """Thresholds for every depth: a quantile of the probabilities of the true classes (Sadinle et al., JASA 2019).

    Raises:
        ValueError: alpha is not between 0 and 1, or there are too few images to guarantee it.
    """
    count = len(held_out.labels)
    rank = math.floor((count + 1) * alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    if rank < 1:
        raise ValueError(f"alpha={alpha} needs {math.ceil(1 / alpha) - 1} images or more, got {count}.")
    p = F.softmax(held_out.logits, dim=-1)
    of_label = p.gather(2, held_out.labels[:, None, None].expand(-1, p.shape[1], 1)).squeeze(2)
    return PredictionSets(tuple(of_label.sort(0).values[rank - 1].tolist()), alpha)
