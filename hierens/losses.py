"""Losses of leaf logits (N, leaves, classes): sums of cross-entropies, averaged over the batch, in float32.

The losses of trees are equations (9) to (12) of Ruiz & Verbeek (arXiv 2003.01474): y_n are the logits of leaf n, y^b is
the mean of the first 2^b, y^E = y^B the mean of all, and l(y, t) the cross-entropy of softmax(y) with target t. The
losses of multi-exit networks are from IMTA (arXiv 1908.06294), and our interpretation of AEP (arXiv 2301.12168).

Dense predictions have leaf logits (N, leaves, classes, H, W), targets (N, H, W) or (N, classes, H, W) and teachers
(N, classes, H, W). Every pixel then counts as an image of the batch, and every pixel needs a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor

from hierens.core.predictions import PredictionWeights, at_least_float32, check_logits
from hierens.core.tree import nested_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Logits = Float[Tensor, "n leaves classes *pixels"]
    Target = Int[Tensor, "n *pixels"] | Float[Tensor, "n classes *pixels"]
    Scalar = Float[Tensor, ""]


class Softening(TypedDict, total=False):
    """Options of the distillation terms.

    Attributes:
        teacher: logits (N, classes) that replace the full ensemble's; no gradient flows into them.
        prediction_weights: as for `nested_predictions`.
        temper_students: as for `Objective`.
        standardize: as `Objective.standardize_logits`.
    """

    teacher: Tensor | None
    prediction_weights: PredictionWeights | None
    temper_students: bool
    standardize: bool


def nested_predictions(
    leaf_logits: Logits, prediction_weights: PredictionWeights | None = None
) -> Float[Tensor, "n depths classes *pixels"]:
    """The logits of the nested ensembles, y^b = 1 / 2^b sum_{n <= 2^b} y_n (eq. 5), and the mean of all leaves.

    Args:
        leaf_logits: (N, leaves, classes); half precision is summed in float32.
        prediction_weights: `model.prediction_weights`; by default those of a tree.

    Returns:
        (N, depths, classes): means over the first 1, 2, 4, ... and all leaves.

    Raises:
        ValueError: the logits have another shape or type.
    """
    check_logits(leaf_logits)
    return (prediction_weights or PredictionWeights(nested_sizes(leaf_logits.shape[1])))(leaf_logits)


def independent(leaf_logits: Logits, target: Target) -> Scalar:
    """L_I = sum_n l(y_n, y): the loss of each network on the labels (eq. 9).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).

    Returns:
        The sum over networks of the cross-entropy, mean over the batch.
    """
    check_logits(leaf_logits)
    return _to_labels(at_least_float32(leaf_logits), target)


def hierarchical(
    leaf_logits: Logits,
    target: Target,
    prediction_weights: PredictionWeights | None = None,
    depth_weights: Sequence[float] = (),
) -> Scalar:
    """L_H = sum_{b <= B} l(y^b, y): the loss of each nested ensemble on the labels (eq. 10).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).
        prediction_weights: as for `nested_predictions`.
        depth_weights: weights of the nested ensembles, all 1 by default.

    Returns:
        The sum over nested ensembles of the cross-entropy, mean over the batch.
    """
    nested = nested_predictions(leaf_logits, prediction_weights)
    return _to_labels(nested, target, _checked_weights(depth_weights, nested, leaf_logits))


def ensemble(leaf_logits: Logits, target: Target, prediction_weights: PredictionWeights | None = None) -> Scalar:
    """l(y^B, y): the loss of the full ensemble on the labels, our interpretation of AEP (arXiv 2301.12168).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).
        prediction_weights: as for `nested_predictions`.

    Returns:
        The cross-entropy, mean over the batch.
    """
    return _to_labels(nested_predictions(leaf_logits, prediction_weights)[:, -1:], target)


def codistillation(
    leaf_logits: Logits, target: Target | None = None, temperature: float = 2.0, **soft: Unpack[Softening]
) -> Scalar:
    """L_D = sum_n l(y_n, softmax(y^E / T)): the full ensemble is the teacher of each network (eq. 11).

    Args:
        leaf_logits: (N, leaves, classes).
        target: not used; for a uniform signature.
        temperature: T, of the teacher only (section 4.1).
        **soft: see `Softening`.

    Returns:
        The sum over networks of the cross-entropy with the detached teacher, mean over the batch.
    """
    nested = nested_predictions(leaf_logits, soft.get("prediction_weights"))
    _check_target(leaf_logits, target)
    teacher = _teacher_of(leaf_logits, nested, soft)
    return _to_teacher(at_least_float32(leaf_logits), teacher, temperature, soft)


def hierarchical_codistillation(
    leaf_logits: Logits,
    target: Target | None = None,
    temperature: float = 2.0,
    depth_weights: Sequence[float] = (),
    **soft: Unpack[Softening],
) -> Scalar:
    """L_HD = sum_{b < B} l(y^b, softmax(y^E / T)): the full ensemble is the teacher of the smaller ones (eq. 12).

    Args:
        leaf_logits: (N, leaves, classes); for one leaf the sum is empty and the loss 0.
        target: not used; for a uniform signature.
        temperature: T, of the teacher only (section 4.1).
        depth_weights: weights of all nested ensembles, all 1 by default; the last is not used.
        **soft: see `Softening`.

    Returns:
        The sum over the nested ensembles except the full one, mean over the batch.
    """
    nested = nested_predictions(leaf_logits, soft.get("prediction_weights"))
    _check_target(leaf_logits, target)
    weights = _checked_weights(depth_weights, nested, leaf_logits)
    teacher = _teacher_of(leaf_logits, nested, soft)
    return _to_teacher(nested[:, :-1], teacher, temperature, soft, weights[:-1])


def stepwise_codistillation(
    leaf_logits: Logits, target: Target | None = None, temperature: float = 2.0, **soft: Unpack[Softening]
) -> Scalar:
    """sum_{b < B} l(y^b, softmax(y^{b+1} / T)): each nested ensemble has the next larger one as its teacher.

    Eq. 12 of arXiv 2003.01474 with teachers of similar size, like teacher assistants (arXiv 1902.03393).

    Args:
        leaf_logits: (N, leaves, classes); for one leaf the sum is empty and the loss 0.
        target: not used; for a uniform signature.
        temperature: T, of the teachers.
        **soft: see `Softening`; a `teacher` is not used.

    Returns:
        The sum over the nested ensembles except the full one, mean over the batch.
    """
    nested = nested_predictions(leaf_logits, soft.get("prediction_weights"))
    _check_target(leaf_logits, target)
    return _to_teacher(nested[:, :-1], nested[:, 1:], temperature, soft)


def one_for_all(
    leaf_logits: Logits,
    target: Target,
    gamma: float = 0.9,
    temperature: float = 3.0,
    teacher: Tensor | None = None,
    mean_over_classes: bool = False,
) -> Scalar:
    """The last exit, trained on the labels, is the teacher of all others (Li et al., arXiv 1908.06294, section 3.3).

    sum_{i<K} [(1 - gamma) l(z_i, y) + gamma T^2 KL(softmax(z_K / T) || softmax(z_i / T))] + l(z_K, y)

    Args:
        leaf_logits: of the K exits, (N, exits, classes).
        target: class indices (N,) or probabilities (N, classes), as from mixup; not used in the distillation terms.
        gamma: weight of the distillation terms, from 0 to 1.
        temperature: T, of teacher and students.
        teacher: logits (N, classes) that replace z_K; no gradient flows into the teacher.
        mean_over_classes: divide the divergence by the number of classes, as the authors' code does.

    Returns:
        The sum over exits, mean over the batch.
    """
    others, last = leaf_logits[:, :-1], leaf_logits[:, -1:]
    loss = independent(last, target)
    if not others.shape[1]:
        return loss
    distilled = distillation(others, last[:, 0] if teacher is None else teacher, temperature)
    if mean_over_classes:
        distilled = distilled / leaf_logits.shape[2]
    return loss + (1 - gamma) * independent(others, target) + gamma * distilled


def distillation(leaf_logits: Logits, teacher: Tensor, temperature: float = 2.0) -> Scalar:
    """Another model is the teacher of each network: sum_n T^2 KL(softmax(t / T) || softmax(y_n / T)).

    Hinton et al. (arXiv 1503.02531, section 2), summed over networks like L_I.

    Args:
        leaf_logits: (N, leaves, classes).
        teacher: the other model's logits t, (N, classes); no gradient flows into them.
        temperature: T, of teacher and students.

    Returns:
        The sum over networks of the divergence, mean over the batch.

    Raises:
        ValueError: shapes do not match, or the temperature is not positive.
    """
    check_logits(leaf_logits)
    _check_not_empty(leaf_logits)
    _check_teacher(leaf_logits, teacher)
    check_temperature(temperature)
    log_q = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=1)[:, None]
    log_p = F.log_softmax(at_least_float32(leaf_logits) / temperature, dim=2)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum((1, 2)).mean()


# --- cross-entropies of several predictions ---------------------------------------------------------------------------


def _to_labels(predictions: Tensor, target: Tensor, weights: Sequence[float] = ()) -> Tensor:
    """sum_p w_p l(z_p, y), mean over the batch, for predictions (N, P, classes)."""
    _check_target(predictions, target)
    targets = target.to(predictions) if target.ndim == predictions.ndim - 1 else target
    return _cross_entropy(predictions, targets[:, None], weights)


def _to_teacher(
    students: Tensor, teachers: Tensor, temperature: float, soft: Softening, weights: Sequence[float] = ()
) -> Tensor:
    """sum_p w_p l(z_p, softmax(t_p / T)), mean over the batch, for students (N, P, classes) and one or P teachers."""
    check_temperature(temperature)
    scale = _standardized if soft.get("standardize") else lambda logits: logits
    targets = F.softmax(scale(teachers.detach()) / temperature, dim=2)
    if not soft.get("temper_students"):
        return _cross_entropy(students, targets, weights)
    return temperature**2 * _cross_entropy(scale(students) / temperature, targets, weights)


def _cross_entropy(predictions: Tensor, targets: Tensor, weights: Sequence[float] = ()) -> Tensor:
    """The weighted sum over P predictions of the cross-entropy, mean over N and pixels.

    Args:
        predictions: (N, P, classes, ...).
        targets: class indices (N, 1, ...), or probabilities (N, 1 or P, classes, ...).
        weights: of the predictions, all 1 by default.
    """
    _check_not_empty(predictions)
    count = predictions.shape[1]
    targets = targets.expand(-1, count, *targets.shape[2:])
    each = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    losses = each.view(len(predictions), count, math.prod(predictions.shape[3:]))
    if weights:
        losses = losses * losses.new_tensor(weights)[:, None]
    return losses.sum(1).mean()


def _check_not_empty(logits: Tensor) -> None:
    if not len(logits):
        raise ValueError("there is no image in the batch, so the mean loss is undefined: skip empty batches.")


def _standardized(logits: Tensor) -> Tensor:
    """Standardise logits to mean 0 and standard deviation 1 over classes."""
    return (logits - logits.mean(2, keepdim=True)) / (logits.std(2, keepdim=True, correction=0) + 1e-7)


def _teacher_of(leaf_logits: Tensor, nested: Tensor, soft: Softening) -> Tensor:
    """The given teacher, or the full ensemble, (N, 1, classes)."""
    teacher = soft.get("teacher")
    if teacher is None:
        return nested[:, -1:]
    _check_teacher(leaf_logits, teacher)
    return at_least_float32(teacher)[:, None]


def _checked_weights(depth_weights: Sequence[float], nested: Tensor, leaf_logits: Tensor) -> Sequence[float]:
    depths = nested.shape[1]
    if depth_weights and len(depth_weights) != depths:
        raise ValueError(
            f"depth_weights needs {depths} values, one per depth of {leaf_logits.shape[1]} leaves: {depth_weights}."
        )
    return depth_weights


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless a temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def _check_teacher(leaf_logits: Tensor, teacher: Tensor) -> None:
    wanted = (leaf_logits.shape[0], *leaf_logits.shape[2:])
    if tuple(teacher.shape) != wanted:
        form = "(N, classes)" if len(wanted) == 2 else "(N, classes, H, W)"
        raise ValueError(f"the teacher's logits must be {wanted} {form}, got shape {tuple(teacher.shape)}.")


def _check_target(leaf_logits: Tensor, target: Tensor | None) -> None:
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise ValueError(f"targets must be a tensor, got {target!r}: pass a temperature by name.")
    batch, _, classes, *pixels = leaf_logits.shape
    indices, probabilities, shape = (batch, *pixels), (batch, classes, *pixels), tuple(target.shape)
    if shape not in (indices, probabilities):
        raise ValueError(f"targets must be {indices} or {probabilities}, got shape {shape}.")
    if shape == indices and target.is_floating_point():
        form = "(N, H, W)" if pixels else "(N,)"
        raise ValueError(f"targets {form} are class indices and must be integers, got {target.dtype}.")
