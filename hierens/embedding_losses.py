"""Distillation of embeddings: the full ensemble's embedding is the teacher of the smaller ones, without labels.

e_n is the embedding of leaf n, e^b the mean of the first 2^b, and e^E the mean of all, which is detached. The sums are
those of equations (11) and (12) of Ruiz & Verbeek (arXiv 2003.01474), with a distance of embeddings in place of the
cross-entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from hierens.core.predictions import PredictionWeights, at_least_float32, check_logits
from hierens.core.tree import nested_sizes

if TYPE_CHECKING:
    from jaxtyping import Float

    Embeddings = Float[Tensor, "n leaves features"]
    Scalar = Float[Tensor, ""]

Students = Literal["depths", "leaves"]


def cosine_distillation(leaf_embeddings: Embeddings, students: Students = "depths") -> Scalar:
    """sum_{b < B} 1 - cos(e^b, e^E), or with `students="leaves"` sum_n 1 - cos(e_n, e^E).

    Args:
        leaf_embeddings: (N, leaves, features): `model.forward_head(features, pre_logits=True, reduce=False)`, or
            `model(x, reduce=False)` of a model without classifier.
        students: `depths`, the nested means except the full one, as in eq. 12; or `leaves`, each leaf, as in eq. 11.

    Returns:
        The sum over students, mean over the batch; 0 for the depths of one leaf.

    Raises:
        ValueError: no images, embeddings of another shape or type, or other students.
    """
    found, teacher = _students(leaf_embeddings, students)
    return (1 - F.cosine_similarity(found, teacher, dim=-1)).sum(1).mean()


def mse_distillation(leaf_embeddings: Embeddings, students: Students = "depths") -> Scalar:
    """sum_{b < B} |e^b - e^E|^2 / features, or with `students="leaves"` sum_n |e_n - e^E|^2 / features.

    Args:
        leaf_embeddings: as for `cosine_distillation`.
        students: likewise.

    Returns:
        The sum over students of the mean squared error, mean over the batch; 0 for the depths of one leaf.

    Raises:
        ValueError: as for `cosine_distillation`.
    """
    found, teacher = _students(leaf_embeddings, students)
    return (found - teacher).square().mean(-1).sum(1).mean()


def _students(leaf_embeddings: Tensor, students: Students) -> tuple[Tensor, Tensor]:
    """The students (N, P, features), and the detached teacher (N, 1, features)."""
    check_logits(leaf_embeddings)
    if not len(leaf_embeddings):
        raise ValueError("there is no image in the batch, so the mean loss is undefined: skip empty batches.")
    if students not in ("depths", "leaves"):
        raise ValueError(f"students must be 'depths' or 'leaves', got {students!r}.")
    nested = PredictionWeights(nested_sizes(leaf_embeddings.shape[1]))(leaf_embeddings)
    found = nested[:, :-1] if students == "depths" else at_least_float32(leaf_embeddings)
    return found, nested[:, -1:].detach()
