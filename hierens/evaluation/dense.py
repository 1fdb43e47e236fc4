"""Metrics of dense predictions, such as segmentation: those of images, for pixels, and the intersection over union.

Needs torchmetrics (the extra `train`). Maps of the disagreement of networks are in `hierens.evaluation.uncertainty`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hierens.core.labels import NO_CLASS
from hierens.core.predictions import PredictionWeights, check_logits
from hierens.core.tree import nested_sizes
from hierens.evaluation.metrics import LeafEvaluation, LeafMetrics


@dataclass(frozen=True)
class DenseEvaluation(LeafEvaluation):
    """Metrics of the nested ensembles and of the single networks, in which every pixel counts as an image.

    Attributes:
        miou: of the nested ensembles, the mean over classes of the intersection over union, in percent. Intersections
            and unions are summed over all images first; a class that is neither labelled nor predicted does not count.
        leaf_miou: of every network alone, in the order of the leaves.
    """

    miou: list[float]
    leaf_miou: list[float]


class DenseMetrics(LeafMetrics):
    """Computes a `DenseEvaluation` batch by batch; keeps 5 bytes per pixel and depth.

    Args:
        prediction_weights: `model.prediction_weights`; by default those of a tree.

    Examples:
        >>> metrics = DenseMetrics()
        >>> leaf_logits = torch.tensor([[[3.0, -3.0]], [[1.0, 1.0]]]).movedim(2, 1)[None, ..., None]  # 2 networks
        >>> metrics.update(leaf_logits, torch.tensor([[[0]]]))
        >>> metrics.compute().miou
        [100.0, 100.0]
    """

    @torch.no_grad()
    def update(self, leaf_logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            leaf_logits: (N, leaves, classes, H, W), of any floating-point type.
            targets: class indices (N, H, W); pixels with -1, which have no class, are skipped.

        Raises:
            ValueError: shapes do not match, or a target is neither a class index nor -1.
        """
        check_logits(leaf_logits)
        images, _, classes, *size = leaf_logits.shape
        if not size or targets.shape != (images, *size):
            raise ValueError(
                "dense metrics need logits (N, leaves, classes, H, W) and targets (N, H, W), got "
                f"{tuple(leaf_logits.shape)} and {tuple(targets.shape)}."
            )
        if len(wrong := targets[(targets < NO_CLASS) | (targets >= classes)]):
            raise ValueError(
                f"a pixel has the label {wrong[0].item()}, but the model's classes are 0 to {classes - 1}: label "
                f"pixels without a class {NO_CLASS}."
            )
        known = targets != NO_CLASS
        pixels, labels = leaf_logits.movedim((3, 4), (1, 2))[known], targets[known]  # (P, leaves, classes) and (P,)
        super().update(pixels, labels)
        weights = self._prediction_weights or PredictionWeights(nested_sizes(pixels.shape[1]))
        predicted = torch.cat([weights(pixels), pixels], 1).argmax(-1).T  # (depths + leaves, P)
        pairs = [torch.bincount(labels * classes + row, minlength=classes**2) for row in predicted]
        self._add("confusion", torch.stack(pairs).view(-1, classes, classes))

    def compute(self) -> DenseEvaluation:
        """The metrics of all batches so far.

        Raises:
            ValueError: there were no labelled pixels, or torchmetrics is not installed.
        """
        of_pixels = super().compute()
        confusion, depths = self._sums["confusion"], len(of_pixels.accuracy)
        both = confusion.diagonal(dim1=1, dim2=2)
        miou = (100 * both / (confusion.sum(1) + confusion.sum(2) - both)).nanmean(1).tolist()
        return DenseEvaluation(**vars(of_pixels), miou=miou[:depths], leaf_miou=miou[depths:])
