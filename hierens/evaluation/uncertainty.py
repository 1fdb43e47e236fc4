"""How sure an ensemble is of an answer, and how many errors are left when the least sure ones are withheld."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Measure = Literal["probability", "margin", "entropy", "agreement"]
MEASURES: tuple[Measure, ...] = ("probability", "margin", "entropy", "agreement")


def certainty(logits: Tensor, votes: Tensor, measure: Measure) -> Tensor:
    """How sure an ensemble's answer is, from 0 to 1.

    Args:
        logits: of the ensemble, (N, classes).
        votes: the class that each network names, (N, networks).
        measure: `probability`: of the likeliest class; `margin`: to the second likeliest; `entropy`: 1 minus entropy
            over that of a uniform answer; `agreement`: share of the networks that name the ensemble's class, less
            (1 - its probability) / networks, so that images equally agreed upon are told apart, as thresholds for a
            budget need it.

    Returns:
        (N,).
    """
    p = F.softmax(logits.float(), dim=-1)
    if measure == "probability":
        return p.amax(-1)
    if measure == "margin":
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        return first - second
    if measure == "entropy":
        return 1 - torch.special.entr(p).sum(-1) / torch.log(torch.tensor(float(p.shape[-1])))
    likeliest, named = p.max(-1)
    agreed = (votes == named[:, None]).float().mean(-1)
    return (agreed - (1 - likeliest) / votes.shape[1]).clamp_min(0)


def mutual_information(leaf_logits: Tensor) -> Tensor:
    """What the networks disagree on: the entropy of their mean distribution less their mean entropy, in nats.

    Also known as BALD or as epistemic uncertainty (Depeweg et al., ICML 2018, section 3). The mean here is that of
    probabilities, as the decomposition requires; the ensemble's answer is the mean of logits.

    Args:
        leaf_logits: (N, networks, classes).

    Returns:
        (N,), not negative; 0 for a single network.
    """
    p = F.softmax(leaf_logits.float(), dim=-1)
    information = torch.special.entr(p.mean(1)).sum(-1) - torch.special.entr(p).sum(-1).mean(1)
    return information.clamp_min(0)


def variance(leaf_logits: Tensor) -> Tensor:
    """Variance between the networks' probabilities, mean over classes.

    Args:
        leaf_logits: (N, networks, classes).

    Returns:
        (N,); 0 for a single network.
    """
    return F.softmax(leaf_logits.float(), dim=-1).var(1, correction=0).mean(-1)


@dataclass(frozen=True)
class RiskCoverage:
    """Selective prediction: the error that is left when only the surest answers are given (El-Yaniv and Wiener, 2010).

    Attributes:
        coverage: share of images answered, (points,), rising to 1.
        risk: share of wrong answers among those, (points,).
        area: mean risk over all coverages (AURC), from 0 to 1; lower is better.
    """

    coverage: Tensor
    risk: Tensor
    area: float


def risk_coverage(sure: Tensor, correct: Tensor) -> RiskCoverage:
    """The curve of images answered in falling order of certainty; images equally sure are answered together.

    Args:
        sure: certainty, or anything that rises with it, (N,).
        correct: whether the answers are right, (N,).

    Raises:
        ValueError: there are no images.
    """
    if not len(sure):
        raise ValueError("there is no image to answer.")
    order = sure.argsort(descending=True, stable=True)
    wrong = (~correct.bool())[order].double().cumsum(0)
    _, runs = sure[order].unique_consecutive(return_counts=True)
    last = runs.cumsum(0)  # images answered once all of the same certainty are
    risk = wrong[last - 1] / last
    area = float((risk * runs).sum() / len(sure))
    return RiskCoverage(last / len(sure), risk, area)
