"""Measures of certainty and disagreement, and selective prediction.

The measures also take dense predictions, with two more dimensions H and W at the end, and then return maps (N, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.core.json_files import short

Measure = Literal["probability", "margin", "entropy", "agreement"]
MEASURES: tuple[Measure, ...] = ("probability", "margin", "entropy", "agreement")


def check_measure(measure: Any) -> None:
    """Check the name of a measure.

    Raises:
        ValueError: it is unknown.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {short(measure)}.")


def certainty(logits: Tensor, votes: Tensor, measure: Measure) -> Tensor:
    """Certainty of an ensemble's predictions, from 0 to 1.

    Args:
        logits: of the ensemble, (N, classes).
        votes: the class that each network predicts, (N, networks).
        measure: `probability`: of the most probable class; `margin`: the difference to the second most probable class;
            `entropy`: 1 minus the entropy divided by that of a uniform distribution; `agreement`: the share of networks
            that predict the ensemble's class, minus (1 - its probability) / networks, which orders images with equal
            agreement, as thresholds for a budget need it.

    Returns:
        (N,).
    """
    p = F.softmax(logits.float(), dim=1)
    if measure == "probability":
        return p.amax(1)
    if measure == "margin":
        first, second = p.topk(2, dim=1).values.unbind(1)
        return first - second
    if measure == "entropy":
        return 1 - torch.special.entr(p).sum(1) / torch.log(torch.tensor(float(p.shape[1])))
    probability, predicted = p.max(1)
    agreement = (votes == predicted[:, None]).float().mean(1)
    return (agreement - (1 - probability) / votes.shape[1]).clamp_min(0)


def mutual_information(leaf_logits: Tensor) -> Tensor:
    """Mutual information of class and network: the entropy of the mean distribution minus the mean entropy, in nats.

    It measures the disagreement of the networks, and is also known as BALD or epistemic uncertainty (Depeweg et al.,
    ICML 2018, section 3). It averages probabilities, as the decomposition requires; the ensemble averages logits.

    Args:
        leaf_logits: (N, networks, classes).

    Returns:
        (N,), not negative; 0 for a single network.
    """
    p = F.softmax(leaf_logits.float(), dim=2)
    information = torch.special.entr(p.mean(1)).sum(1) - torch.special.entr(p).sum(2).mean(1)
    return information.clamp_min(0)


def variance(leaf_logits: Tensor) -> Tensor:
    """Variance of the networks' probabilities, mean over classes.

    Args:
        leaf_logits: (N, networks, classes).

    Returns:
        (N,); 0 for a single network.
    """
    return F.softmax(leaf_logits.float(), dim=2).var(1, correction=0).mean(1)


@dataclass(frozen=True)
class RiskCoverage:
    """Selective prediction: the error if only the most certain predictions are used (El-Yaniv and Wiener, 2010).

    Attributes:
        coverage: share of images whose prediction is used, (points,), increasing to 1.
        risk: share of wrong predictions among those, (points,).
        area: mean risk over all coverages (AURC), from 0 to 1; lower is better.
    """

    coverage: Tensor
    risk: Tensor
    area: float


def risk_coverage(certainties: Tensor, correct: Tensor) -> RiskCoverage:
    """The curve of risk over coverage, with images in descending order of certainty; equal ones make one point.

    Args:
        certainties: certainty of each prediction, or any increasing function of it, (N,).
        correct: whether the predictions are correct, (N,).

    Raises:
        ValueError: there are no images.
    """
    if not len(certainties):
        raise ValueError("a risk-coverage curve needs at least one image, and there is no image.")
    order = certainties.argsort(descending=True, stable=True)
    wrong = (~correct.bool())[order].double().cumsum(0)
    _, counts = certainties[order].unique_consecutive(return_counts=True)
    covered = counts.cumsum(0)  # images with at least each distinct certainty
    risk = wrong[covered - 1] / covered
    area = float((risk * counts).sum() / len(certainties))
    return RiskCoverage(covered / len(certainties), risk, area)
