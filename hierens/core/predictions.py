"""The prediction of each depth as a weighted mean of leaf logits.

The leaves of a tree are its networks, those of a multi-exit network its exits. Losses, metrics and calibration take the
predictions of all depths from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Combination = Literal["mean", "normalized", "concat"]
Average = Literal["logits", "probabilities"]


@dataclass(frozen=True, eq=False)
class PredictionWeights:
    """A matrix (depths, leaves) of weights: row b, times the leaf logits, is the prediction of depth b.

    Every row sums to 1, so the logits of all depths have the same scale. A row contains the weights of its leaves,
    normalised: a truncated model and the whole model have the same prediction at each depth.

    Attributes:
        sizes: leaves evaluated at each depth.
        leaf_weights: positive, one per leaf that is not one of `num_exits`; equal by default.
        num_exits: the first `num_exits` leaves are exits: each is the prediction of its depth by itself, and none has a
            weight in the ensembles of later leaves.
        average: `logits`, their weighted mean; or `probabilities`, the logarithm of the weighted mean of the leaves'
            softmax, whose softmax is that mean.

    Examples:
        >>> leaf_logits = torch.tensor([[[0.0], [4.0], [8.0]]])  # one image, three leaves, one class
        >>> PredictionWeights((1, 2, 3))(leaf_logits).flatten().tolist()
        [0.0, 2.0, 4.0]
        >>> PredictionWeights((1, 2, 3), torch.tensor([1.0, 1.0, 2.0])).matrix().tolist()
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]
        >>> PredictionWeights((1, 2, 3), num_exits=1).matrix().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
    """

    sizes: tuple[int, ...]
    leaf_weights: Tensor | None = None
    num_exits: int = 0
    average: Average = "logits"

    def matrix(self, like: Tensor | None = None) -> Tensor:
        """The weights, (depths, leaves), float32 or of the type and device of a tensor."""
        like = torch.empty(0) if like is None else like
        own = like.new_ones(self.sizes[-1])
        if self.leaf_weights is not None:
            own = torch.cat([own[: self.num_exits], self.leaf_weights.to(own)])
        contributes = torch.zeros(len(self.sizes), len(own), dtype=torch.bool)
        for depth, leaves in enumerate(self.members):
            contributes[depth, leaves] = True
        weights = own * contributes.to(own.device)
        return weights / weights.sum(1, keepdim=True)

    @property
    def members(self) -> list[slice]:
        """The leaves that have a weight in the prediction of each depth."""
        return [slice(size - 1 if size <= self.num_exits else self.num_exits, size) for size in self.sizes]

    def __call__(self, leaf_logits: Tensor) -> Tensor:
        """The predictions of all depths, (N, depths, classes), or (N, depths, classes, H, W) of dense predictions.

        Args:
            leaf_logits: (N, leaves, classes) or (N, leaves, classes, H, W); half precision is summed in float32.

        Raises:
            ValueError: logits of another shape or type, or of too few leaves.
        """
        check_logits(leaf_logits)
        if leaf_logits.shape[1] != self.sizes[-1]:
            raise ValueError(f"expected logits of {self.sizes[-1]} leaves, got {leaf_logits.shape[1]}.")
        logits = at_least_float32(leaf_logits)
        matrix = self.matrix(logits)[(..., *[None] * (logits.ndim - 2))]  # (depths, leaves, 1), or with two 1 more
        # Row by row over the members only: autocast and TF32 would round a matrix product, in which a leaf that is not
        # finite would also affect all depths.
        if self.average == "probabilities":
            logits = logits.log_softmax(2)
            rows = [(matrix[depth, of].log() + logits[:, of]).logsumexp(1) for depth, of in enumerate(self.members)]
        else:
            rows = [(matrix[depth, of] * logits[:, of]).sum(1) for depth, of in enumerate(self.members)]
        return torch.stack(rows, 1)

    @property
    def has_ensembles(self) -> bool:
        """Whether any prediction is the mean of several leaves."""
        return self.num_exits < self.sizes[-1]

    def of_first(self, leaves: int) -> PredictionWeights:
        """The weights for a single prediction, from the first `leaves` leaves."""
        own = None if self.leaf_weights is None else self.leaf_weights[: max(leaves - self.num_exits, 0)]
        return replace(self, sizes=(leaves,), leaf_weights=own, num_exits=min(self.num_exits, leaves))

    def cpu(self) -> PredictionWeights:
        """The same on the CPU, without gradients."""
        return replace(self, leaf_weights=None if self.leaf_weights is None else self.leaf_weights.detach().cpu())


def combine_embeddings(leaf_embeddings: Tensor, combine: Combination = "normalized") -> Tensor:
    """One embedding per image, from those of its leaves.

    Args:
        leaf_embeddings: (N, leaves, features).
        combine: `mean` of the leaves, (N, features); `normalized`, their mean scaled to unit length; or `concat`, all
            of them in order, (N, leaves * features).

    Raises:
        ValueError: outputs that are not one vector per image and leaf, or an unknown combination.
    """
    if leaf_embeddings.ndim != 3:
        shape = tuple(leaf_embeddings.shape[2:])
        raise ValueError(
            f"an embedding is one vector per image, and the leaves of this model give {shape}: call the model itself, "
            "and pool its output."
        )
    if combine == "concat":
        return leaf_embeddings.flatten(1)
    if combine not in ("mean", "normalized"):
        raise ValueError(f"combine must be 'mean', 'normalized' or 'concat', got {combine!r}.")
    mean = leaf_embeddings.mean(1)
    return F.normalize(mean, dim=-1) if combine == "normalized" else mean


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision converted to float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_logits(leaf_logits: Tensor) -> None:
    """Raise a ValueError unless these are leaf logits (N, leaves, classes) or (N, leaves, classes, H, W)."""
    shape = tuple(leaf_logits.shape)
    if leaf_logits.ndim not in (3, 5) or not leaf_logits.is_floating_point():
        raise ValueError(
            "leaf logits must be floating-point (N, leaves, classes) or (N, leaves, classes, H, W), got "
            f"{leaf_logits.dtype} of shape {shape}: call the model with reduce=False."
        )
    if shape[1] == 0:
        raise ValueError(f"leaf logits must hold at least one leaf, got shape {shape}.")
