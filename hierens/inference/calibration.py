"""Settings chosen on held-out data: thresholds that keep a budget, temperatures, and sets that hold the true class.

All of it starts from one pass over labelled images, `collect`, which keeps what every depth says of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.core.modes import evaluating
from hierens.core.protocol import AdaptiveModel
from hierens.core.tree import nested_sizes
from hierens.evaluation.uncertainty import Measure, certainty
from hierens.inference.policies import EVERYBODY, NOBODY, Confidence


@dataclass(frozen=True)
class Answers:
    """What every depth says of labelled images.

    Attributes:
        logits: of the nested ensembles, (N, depths, classes).
        votes: the class that each network names, (N, leaves).
        labels: (N,).
        macs: of every depth, per image.
        sizes: networks (or exits) of every depth; by default those of a tree.
    """

    logits: Tensor
    votes: Tensor
    labels: Tensor
    macs: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    def certainties(self, measure: Measure) -> Tensor:
        """Of every depth, (N, depths): see `hierens.evaluation.uncertainty.certainty`."""
        sizes = self.sizes or nested_sizes(self.votes.shape[1])
        columns = [certainty(self.logits[:, b], self.votes[:, :n], measure) for b, n in enumerate(sizes)]
        return torch.stack(columns, 1)


@torch.no_grad()
def collect(model: AdaptiveModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """Every depth's answers, from one pass over all networks, in evaluation mode.

    Args:
        model: the ensemble.
        batches: images (N, C, H, W) and class indices (N,); images with a negative one are passed over.

    Raises:
        ValueError: there are no labelled images.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    device = next(model.parameters()).device
    size: tuple[int, ...] = ()
    with evaluating(model):
        for images, labels in batches:
            size = tuple(images.shape[1:])
            known = labels >= 0
            leaf_logits = model(images.to(device), reduce=False).cpu()[known]
            parts.append((model.prediction_weights.cpu()(leaf_logits), leaf_logits.argmax(-1), labels[known]))
    if not sum(len(labels) for *_, labels in parts):
        raise ValueError("there is nothing to calibrate on: no labelled image was seen.")
    logits, votes, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Answers(logits, votes, labels, model.macs(size), model.sizes)


def calibrate(
    model: AdaptiveModel,
    batches: Iterable[tuple[Tensor, Tensor]] | Answers,
    budget: float,
    measure: Measure = "probability",
) -> Confidence:
    """Thresholds with which images cost a given number of MACs in the mean (budgeted batch classification).

    As MSDNet does it (Huang et al., ICLR 2018, section 4): of the images that reach an exit, a share leaves there, the
    surest ones, and the shares of all images that leave at successive depths fall or rise geometrically. The ratio is
    found by bisection so that the mean cost on the held-out images meets the budget.

    Args:
        model: the ensemble.
        batches: held-out images and labels, or what `collect` made of them.
        budget: mean multiply-accumulates per image.
        measure: of certainty.

    Returns:
        The policy; on images like those held out its mean cost is the budget.

    Raises:
        ValueError: a budget below the first network's cost or above that of all.
    """
    answers = batches if isinstance(batches, Answers) else collect(model, batches)
    least, most = answers.macs[0], answers.macs[-1]
    if not least <= budget <= most:
        raise ValueError(f"the budget must lie from {least:.3g} to {most:.3g} MACs per image, got {budget:.3g}.")
    sure = answers.certainties(measure)
    low, high = -30.0, 30.0  # logarithms of the ratio: all leave at the first depth, or at the last
    for _ in range(60):
        middle = (low + high) / 2
        if mean_cost(sure, _thresholds(sure, middle), answers.macs) <= budget:
            low = middle
        else:
            high = middle
    return Confidence(_thresholds(sure, low), measure)


def exits(sure: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The depth at which each image leaves, (N,), given the certainties (N, depths) of all depths."""
    return (sure >= torch.tensor([*thresholds, EVERYBODY], dtype=sure.dtype)).int().argmax(1)


def mean_cost(sure: Tensor, thresholds: Sequence[float], macs: Sequence[int]) -> float:
    """Mean multiply-accumulates per image."""
    return float(torch.tensor(macs, dtype=torch.float64)[exits(sure, thresholds)].mean())


def _thresholds(sure: Tensor, log_ratio: float) -> tuple[float, ...]:
    """Thresholds with which shares proportional to exp(log_ratio * depth) of the images leave at each depth."""
    count, depths = sure.shape
    weights = torch.softmax(log_ratio * torch.arange(depths, dtype=torch.float64), 0)
    left, found = torch.ones(count, dtype=torch.bool), []
    for depth in range(depths - 1):
        here = sure[left, depth].sort(descending=True).values
        leaving = min(round(float(weights[depth]) * count), len(here))
        # Between the last that leaves and the first that stays, so that rounding moves neither.
        if leaving == 0:
            threshold = NOBODY
        elif leaving == len(here):
            threshold = EVERYBODY
        else:
            threshold = float(here[leaving - 1] + here[leaving]) / 2
        found.append(threshold)
        left &= ~(sure[:, depth] >= threshold)
    return tuple(found)


@dataclass(frozen=True)
class Temperatures:
    """A temperature per depth, by which its logits are divided (Guo et al., ICML 2017).

    Attributes:
        values: one per depth.
    """

    values: tuple[float, ...]

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """Probabilities (N, classes) of a depth's logits."""
        return F.softmax(logits / self.values[depth], dim=-1)


def fit_temperatures(answers: Answers) -> Temperatures:
    """The temperature of every depth with the lowest negative log-likelihood on held-out images."""
    return Temperatures(tuple(_fit(answers.logits[:, b], answers.labels) for b in range(answers.logits.shape[1])))


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


@dataclass(frozen=True)
class PredictionSets:
    """Sets of classes that hold the true one with a chosen probability (split conformal prediction).

    Attributes:
        thresholds: per depth, the least probability of a class in the set.
        alpha: at most this share of images like those held out has its class outside.
    """

    thresholds: tuple[float, ...]
    alpha: float

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """Which classes are in the set: (N, classes) of booleans. The likeliest always is."""
        p = F.softmax(logits, dim=-1)
        return (p >= self.thresholds[depth]) | F.one_hot(p.argmax(-1), p.shape[-1]).bool()


def fit_prediction_sets(answers: Answers, alpha: float = 0.1) -> PredictionSets:
    """Limits for every depth (Sadinle et al., JASA 2019): the quantile of the true classes' probabilities.

    Raises:
        ValueError: a rate that is not between 0 and 1, or too few images to guarantee it.
    """
    count = len(answers.labels)
    rank = math.floor((count + 1) * alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    if rank < 1:
        raise ValueError(f"alpha={alpha} takes {math.ceil(1 / alpha) - 1} images or more, got {count}.")
    p = F.softmax(answers.logits, dim=-1)
    of_label = p.gather(2, answers.labels[:, None, None].expand(-1, p.shape[1], 1)).squeeze(2)
    return PredictionSets(tuple(of_label.sort(0).values[rank - 1].tolist()), alpha)
