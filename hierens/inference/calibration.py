"""Thresholds for a budget and temperatures, chosen on held-out images.

Both are computed from a `CalibrationSet`, which `collect` makes in one pass over labelled images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.core.modes import evaluating
from hierens.core.protocol import AdaptiveModel
from hierens.core.tree import nested_sizes
from hierens.evaluation.uncertainty import Measure, certainty
from hierens.inference.confidence import EVERYBODY, NOBODY, Confidence


@dataclass(frozen=True)
class CalibrationSet:
    """Predictions of every depth for labelled images.

    Attributes:
        logits: of the nested ensembles, (N, depths, classes).
        votes: the class that each network predicts, (N, leaves).
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
        """Certainty of the prediction of every depth, (N, depths): see `hierens.evaluation.uncertainty.certainty`."""
        sizes = self.sizes or nested_sizes(self.votes.shape[1])
        columns = [certainty(self.logits[:, b], self.votes[:, :n], measure) for b, n in enumerate(sizes)]
        return torch.stack(columns, 1)


@torch.no_grad()
def collect(model: AdaptiveModel, batches: Iterable[tuple[Tensor, Tensor]]) -> CalibrationSet:
    """Predictions of every depth, from one pass over all networks, in evaluation mode.

    Args:
        model: the ensemble.
        batches: images (N, C, H, W) and class indices (N,); images with a negative index are skipped.

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
    return CalibrationSet(logits, votes, labels, model.macs(size), model.sizes)


def calibrate(
    model: AdaptiveModel,
    batches: Iterable[tuple[Tensor, Tensor]] | CalibrationSet,
    budget: float,
    measure: Measure = "probability",
) -> Confidence:
    """Thresholds with which the mean cost per image is a given number of MACs (budgeted batch classification).

    The method is that of MSDNet (Huang et al., ICLR 2018, section 4): at each depth, the images with the most certain
    predictions leave. Their shares of all images fall or rise geometrically from depth to depth. The ratio is found by
    bisection so that the mean cost on the held-out images meets the budget.

    Args:
        model: the ensemble.
        batches: held-out images and labels, or the result of `collect`.
        budget: mean multiply-accumulates per image.
        measure: of certainty.

    Returns:
        The policy. On images like the held-out ones, its mean cost is the budget.

    Raises:
        ValueError: a budget below the cost of the first network, or above that of all networks.
    """
    held_out = batches if isinstance(batches, CalibrationSet) else collect(model, batches)
    least, most = held_out.macs[0], held_out.macs[-1]
    if not least <= budget <= most:
        raise ValueError(f"the budget must be from {least:.3g} to {most:.3g} MACs per image, got {budget:.3g}.")
    certainties = held_out.certainties(measure)
    low, high = -30.0, 30.0  # logarithms of the ratio: all images leave at the first depth, or at the last
    for _ in range(60):
        middle = (low + high) / 2
        if mean_cost(certainties, _thresholds(certainties, middle), held_out.macs) <= budget:
            low = middle
        else:
            high = middle
    return Confidence(_thresholds(certainties, low), measure)


def exits(certainties: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The depth at which each image leaves, (N,), given the certainties of all depths, (N, depths)."""
    return (certainties >= torch.tensor([*thresholds, EVERYBODY], dtype=certainties.dtype)).int().argmax(1)


def mean_cost(certainties: Tensor, thresholds: Sequence[float], macs: Sequence[int]) -> float:
    """Mean multiply-accumulates per image."""
    return float(torch.tensor(macs, dtype=torch.float64)[exits(certainties, thresholds)].mean())


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
