"""Metrics of an ensemble: accuracy, likelihood and calibration of every depth, and the diversity of its networks.

Needs torchmetrics (the extra `train`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hierens.core.install import install_command
from hierens.core.labels import NO_CLASS, as_indices, check_classes, out_of_range
from hierens.core.modes import evaluating
from hierens.core.predictions import PredictionWeights
from hierens.core.tree import nested_sizes
from hierens.evaluation.uncertainty import mutual_information, risk_coverage, variance

BINS = 15  # of the calibration error, the usual number


@dataclass(frozen=True)
class LeafEvaluation:
    """Metrics of the nested ensembles and of the single networks; one value per depth unless stated otherwise.

    Attributes:
        count: number of images.
        accuracy: of the nested ensembles, in percent.
        nll: their mean negative log-likelihood, in nats.
        brier: their Brier score, the squared distance between probabilities and the true class, from 0 to 2.
        ece: their expected calibration error, from 0 to 1: top-1, 15 equal bins, L1 norm.
        std: standard deviation of the evaluated networks' logits around their mean, averaged over classes and images:
            the paper's measure of diversity (arXiv 2003.01474, section 4.2); 0 for a single network.
        agreement: share of images for which two of the evaluated networks predict the same class, mean over pairs, from
            0 to 1; 1 for a single network.
        mutual_information: between class and network, mean over images, in nats: see `hierens.evaluation.uncertainty`.
        variance: of the evaluated networks' probabilities, mean over classes and images.
        aurc: area under the risk-coverage curve, from 0 to 1.
        leaf_accuracy: of every network alone, in percent, in the order of the leaves.
    """

    count: int
    accuracy: list[float]
    nll: list[float]
    brier: list[float]
    ece: list[float]
    std: list[float]
    agreement: list[float]
    mutual_information: list[float]
    variance: list[float]
    aurc: list[float]
    leaf_accuracy: list[float]


class LeafMetrics:
    """Computes a `LeafEvaluation` batch by batch.

    Args:
        prediction_weights: `model.prediction_weights`; by default those of a tree.

    Examples:
        >>> metrics = LeafMetrics()
        >>> metrics.update(torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]), torch.tensor([0]))  # two networks disagree
        >>> result = metrics.compute()
        >>> result.accuracy, result.leaf_accuracy, result.agreement
        ([100.0, 100.0], [100.0, 0.0], [1.0, 0.0])
    """

    def __init__(self, prediction_weights: PredictionWeights | None = None) -> None:
        self._prediction_weights = prediction_weights
        self._sums: dict[str, Tensor] = {}
        self._confidence: list[Tensor] = []
        self._correct: list[Tensor] = []

    @torch.no_grad()
    def update(self, leaf_logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            leaf_logits: (N, leaves, classes), of any floating-point type.
            targets: class indices (N,); images with -1, which have no class, are skipped.

        Raises:
            ValueError: another target that is not a class index, or logits of another shape.
        """
        if leaf_logits.ndim != 3:
            raise ValueError(
                f"expected leaf logits (N, leaves, classes), got shape {tuple(leaf_logits.shape)}: use "
                "hierens.evaluation.dense.DenseMetrics for dense predictions."
            )
        targets = as_indices(targets, "a batch")
        classes = leaf_logits.shape[-1]
        if len(wrong := ((targets < NO_CLASS) | (targets >= classes)).nonzero()):
            raise out_of_range(int(wrong[0]), int(targets[wrong[0]]), classes, "a batch")
        known = targets != NO_CLASS
        leaf_logits, targets = leaf_logits[known], targets[known]
        if not len(targets):
            return
        weights = self._prediction_weights or PredictionWeights(nested_sizes(leaf_logits.shape[1]))
        nested = weights(leaf_logits)  # (N, depths, classes)
        log_p = F.log_softmax(nested, dim=-1)
        p = log_p.exp()
        confidence, predicted = p.max(-1)
        correct = predicted == targets[:, None]
        self._confidence.append(confidence.cpu())
        self._correct.append(correct.cpu())
        votes = leaf_logits.argmax(-1)  # (N, leaves)
        self._add("nll", -log_p.gather(2, targets[:, None, None].expand(-1, log_p.shape[1], 1)).sum((0, 2)))
        truth = F.one_hot(targets, p.shape[-1])[:, None]
        self._add("brier", (p - truth).square().sum(-1).sum(0))
        self._add("leaf", (votes == targets[:, None]).sum(0))
        sizes = [_compared(size, weights.num_exits) for size in weights.sizes]
        logits = leaf_logits.float()
        self._add("std", torch.stack([logits[:, n].std(1, correction=0).mean(-1).sum() for n in sizes]))
        self._add("information", torch.stack([mutual_information(logits[:, n]).sum() for n in sizes]))
        self._add("variance", torch.stack([variance(logits[:, n]).sum() for n in sizes]))
        self._add("same", torch.stack([_agreement(votes[:, n], leaf_logits.shape[2]).sum() for n in sizes]))

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """The metrics of a model on labelled images; arguments as `evaluate_model`."""
        check_classes(model, "evaluation by accuracy")
        device, metrics = next(model.parameters()).device, cls(getattr(model, "prediction_weights", None))
        with evaluating(model):
            for images, targets in batches:
                metrics.update(model(images.to(device), reduce=False), targets.to(device))
        return metrics

    # Not a torchmetrics.Metric: its synchronisation needs a call per state, in which processes must all take part.
    @classmethod
    def merged(cls, parts: Sequence[LeafMetrics]) -> LeafMetrics:
        """The metrics of all batches of several processes."""
        merged = cls()
        for part in parts:
            for name, values in part._sums.items():
                merged._add(name, values)
            merged._confidence += part._confidence
            merged._correct += part._correct
        return merged

    def compute(self) -> LeafEvaluation:
        """The metrics of all batches so far.

        Raises:
            ValueError: there were no labelled images, or torchmetrics is not installed.
        """
        if not self._correct:
            raise ValueError("there is nothing to evaluate: no image has a label.")
        confidence, correct = torch.cat(self._confidence), torch.cat(self._correct)
        count, depths = correct.shape
        confidence, correct = confidence.T.contiguous(), correct.T.int().contiguous()
        ece = [_classification().binary_calibration_error(confidence[b], correct[b], BINS, "l1") for b in range(depths)]
        mean: dict[str, list[float]] = {name: (total / count).tolist() for name, total in self._sums.items()}
        return LeafEvaluation(
            count=count,
            accuracy=[100 * share for share in correct.double().mean(1).tolist()],
            nll=mean["nll"],
            brier=mean["brier"],
            ece=[float(error) for error in ece],
            std=mean["std"],
            agreement=mean["same"],
            mutual_information=mean["information"],
            variance=mean["variance"],
            aurc=[risk_coverage(confidence[b], correct[b]).area for b in range(depths)],
            leaf_accuracy=[100 * share for share in mean["leaf"]],
        )

    def correct(self) -> Tensor:
        """Whether the prediction of each depth is correct for each image so far, (images, depths)."""
        return torch.cat(self._correct)

    def _add(self, name: str, values: Tensor) -> None:
        values = values.double().cpu()
        self._sums[name] = self._sums[name] + values if name in self._sums else values


def evaluate_model(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> LeafEvaluation:
    """Evaluate an ensemble on labelled images, on its device and in evaluation mode.

    Args:
        model: `model(images, reduce=False)` returns (N, leaves, classes). Without `prediction_weights` it is evaluated
            as a tree.
        batches: images (N, C, H, W) and class indices (N,).
    """
    return LeafMetrics.of(model, batches).compute()


def correct_predictions(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether each depth predicts the class of each labelled image, (images, depths); arguments as `evaluate_model`."""
    return LeafMetrics.of(model, batches).correct()


@dataclass(frozen=True)
class PairedDifference:
    """Difference in accuracy of two models on the same images (with the counts of McNemar's test).

    Attributes:
        more: number of images that only the first predicts correctly.
        fewer: number of images that only the second predicts correctly.
        count: number of images.
    """

    more: int
    fewer: int
    count: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> PairedDifference:
        """The difference of two models, given whether each is correct for every image, (images,).

        Examples:
            >>> first, second = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])
            >>> str(PairedDifference.of(first, second))
            '+25.00 ± 47.87 (+1)'
        """
        return cls(int((first & ~second).sum()), int((second & ~first).sum()), len(first))

    @property
    def images(self) -> int:
        """The difference in number of images."""
        return self.more - self.fewer

    @property
    def percent(self) -> float:
        """The difference in percentage points."""
        return 100 * self.images / self.count

    @property
    def error(self) -> float:
        """The standard error of the difference over images, in percentage points; 0 for a single image."""
        if self.count < 2:
            return 0.0
        squares = self.more + self.fewer - self.images**2 / self.count
        return float(100 * (squares / (self.count - 1) / self.count) ** 0.5)

    def __str__(self) -> str:
        """For example `+1.38 ± 0.79 (+26)`: percentage points, their standard error, and number of images."""
        return f"{self.percent:+.2f} ± {self.error:.2f} ({self.images:+d})"


def _compared(size: int, num_exits: int) -> slice:
    """The leaves whose diversity is reported at a depth: all exits so far, or the networks of the ensemble."""
    return slice(num_exits if size > num_exits else 0, size)


def ood_auroc(id_scores: Tensor, ood_scores: Tensor) -> float:
    """Area under the ROC curve of out-of-distribution detection by uncertainty.

    Args:
        id_scores: uncertainty of in-distribution images, (N,).
        ood_scores: uncertainty of out-of-distribution images, (M,).

    Returns:
        The probability that of two images, one of each kind, the out-of-distribution image is the more uncertain one;
        ties count half.

    Raises:
        ValueError: one of the two is empty, or torchmetrics is not installed.
    """
    if not len(id_scores) or not len(ood_scores):
        raise ValueError("out-of-distribution detection needs scores of both kinds of images.")
    scores = torch.cat([id_scores, ood_scores]).double()
    is_ood = torch.cat([torch.zeros(len(id_scores)), torch.ones(len(ood_scores))]).int()
    _, ranks = scores.unique(return_inverse=True)  # torchmetrics needs scores from 0 to 1
    return float(_classification().binary_auroc(ranks.double() / max(1, int(ranks.max())), is_ood))


def _classification() -> Any:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ValueError(f"metrics need torchmetrics: {install_command('train')}.") from error
    return classification


def _agreement(classes: Tensor, num_classes: int) -> Tensor:
    """Per image, the share of pairs of networks that predict the same class. (N, networks) -> (N,)."""
    networks = classes.shape[1]
    if networks == 1:
        return torch.ones(len(classes), device=classes.device)
    votes = F.one_hot(classes, num_classes).sum(1).double()
    return (votes * (votes - 1)).sum(-1) / (networks * (networks - 1))


def as_record(evaluation: LeafEvaluation) -> dict[str, Any]:
    """All lists by name, without the count, for a log."""
    return {name: value for name, value in vars(evaluation).items() if name != "count"}
