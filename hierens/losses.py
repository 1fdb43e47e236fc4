"""Every loss over leaf logits (N, leaves, classes): Ruiz & Verbeek, 3.2 and 3.3, and those of multi-exit networks.

All of them are weighted sums over predictions (single networks, nested ensembles) of a cross-entropy to the
labels and one to a teacher, the full ensemble. So one pass serves any mixture: one log-softmax over the
stacked predictions, one softmax for the teacher, two inner products.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.core.nesting import Nesting, at_least_float32, check_logits
from hierens.core.tree import nested_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Logits = Float[Tensor, "n leaves classes"]
    Target = Int[Tensor, " n"] | Float[Tensor, "n classes"]
    Scalar = Float[Tensor, ""]

SUPERVISED = ("independent", "hierarchical", "ensemble")
DISTILLED = ("codistillation", "hierarchical_codistillation", "stepwise_codistillation")
TERMS = SUPERVISED + DISTILLED
ONE_FOR_ALL, STEPWISE = "one_for_all", "stepwise_codistillation"
_WITH_ONE_FOR_ALL = ("hierarchical", "ensemble")


def nested_predictions(leaf_logits: Logits, nesting: Nesting | None = None) -> Float[Tensor, "n depths classes"]:
    """The nested ensembles' logits, y^b = 1 / 2^b sum_{n <= 2^b} y_n (eq. 5), and the mean of all leaves.

    Args:
        leaf_logits: (N, leaves, classes); half precision is summed in float32.
        nesting: another way to nest them, as `model.nesting`.

    Returns:
        (N, depths, classes): means over the first 1, 2, 4, ... and all leaves.

    Raises:
        ValueError: logits of another shape or type.
    """
    return (nesting or Nesting(nested_sizes(leaf_logits.shape[1])))(leaf_logits)


def independent(leaf_logits: Logits, target: Target) -> Scalar:
    """L_I = sum_n l(y_n, y): every network learns the labels (eq. 9).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).

    Returns:
        The sum over networks of the cross-entropy, mean over the batch.
    """
    return _fused(leaf_logits, target, _Weights({"independent": 1.0}))


def hierarchical(leaf_logits: Logits, target: Target) -> Scalar:
    """L_H = sum_{b <= B} l(y^b, y): every nested ensemble learns the labels (eq. 10).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).

    Returns:
        The sum over nested ensembles of the cross-entropy, mean over the batch.
    """
    return _fused(leaf_logits, target, _Weights({"hierarchical": 1.0}))


def ensemble(leaf_logits: Logits, target: Target) -> Scalar:
    """l(y^B, y): the full ensemble alone learns the labels, as AEP has it (arXiv 2301.12168).

    Args:
        leaf_logits: (N, leaves, classes).
        target: class indices (N,) or probabilities (N, classes).

    Returns:
        Its cross-entropy, mean over the batch.
    """
    return _fused(leaf_logits, target, _Weights({"ensemble": 1.0}))


def one_for_all(
    leaf_logits: Logits, target: Target, gamma: float = 0.9, temperature: float = 3.0, teacher: Tensor | None = None
) -> Scalar:
    """Every exit learns from the last one, which learns the labels (Li et al., arXiv 1908.06294, section 3.3).

    sum_{i<K} [(1 - gamma) l(z_i, y) + gamma T^2 KL(softmax(z_K / T) || softmax(z_i / T))] + l(z_K, y)

    Args:
        leaf_logits: of the K exits, (N, exits, classes).
        target: class indices (N,) or probabilities (N, classes), as mixup gives them; the distilled part never sees it.
        gamma: weight of distillation, from 0 to 1.
        temperature: T, of teacher and students.
        teacher: logits (N, classes) in place of z_K; no gradient flows into either.

    Returns:
        The sum over exits, mean over the batch.
    """
    early, last = leaf_logits[:, :-1], leaf_logits[:, -1:]
    loss = independent(last, target)
    if not early.shape[1]:
        return loss
    distilled = distillation(early, last[:, 0] if teacher is None else teacher, temperature)
    return loss + (1 - gamma) * independent(early, target) + gamma * distilled


def codistillation(leaf_logits: Logits, target: Target | None = None, temperature: float = 2.0) -> Scalar:
    """L_D = sum_n l(y_n, softmax(y^E / T)): every network learns from the full ensemble (eq. 11).

    Args:
        leaf_logits: (N, leaves, classes).
        target: has no part in the loss; taken so that all four losses are called alike.
        temperature: T, of the teacher alone (section 4.1).

    Returns:
        The sum over networks of the cross-entropy to the detached teacher, mean over the batch.
    """
    return _fused(leaf_logits, target, _Weights({"codistillation": 1.0}), temperature)


def hierarchical_codistillation(
    leaf_logits: Logits,
    target: Target | None = None,
    temperature: float = 2.0,
) -> Scalar:
    """L_HD = sum_{b < B} l(y^b, softmax(y^E / T)): smaller ensembles learn from the full one (eq. 12).

    Args:
        leaf_logits: (N, leaves, classes); for one leaf the sum is empty and the loss 0.
        target: has no part in the loss; taken so that all four losses are called alike.
        temperature: T, of the teacher alone (section 4.1).

    Returns:
        The sum over the nested ensembles below the full one, mean over the batch.
    """
    return _fused(leaf_logits, target, _Weights({"hierarchical_codistillation": 1.0}), temperature)


def stepwise_codistillation(
    leaf_logits: Logits,
    target: Target | None = None,
    temperature: float = 2.0,
    temper_students: bool = False,
    standardize: bool = False,
    nesting: Nesting | None = None,
) -> Scalar:
    """sum_{b < B} l(y^b, softmax(y^{b+1} / T)): every nested ensemble learns from the next larger one.

    As eq. 12 of arXiv 2003.01474 with a teacher that is nearer, as teacher assistants are (arXiv 1902.03393).

    Args:
        leaf_logits: (N, leaves, classes); for one leaf the sum is empty and the loss 0.
        target: has no part in the loss; taken so that all losses are called alike.
        temperature: T, of the teachers.
        temper_students: as for `Objective`.
        standardize: as `Objective.standardize_logits`.
        nesting: how leaves make up the nested ensembles; by default as in a tree.

    Returns:
        The sum over the nested ensembles below the full one, mean over the batch.
    """
    check_logits(leaf_logits)
    _check_temperature(temperature)
    nested = (nesting or Nesting(nested_sizes(leaf_logits.shape[1])))(leaf_logits)  # (N, depths, classes)
    soft = _soft_labels(nested[:, 1:], temperature, standardize)
    log_p, factor = _students(nested[:, :-1], temperature, temper_students, standardize)
    return -factor * (soft * log_p).sum((1, 2)).mean()


@dataclass(frozen=True)
class Objective:
    """A loss by name: terms joined by `+`.

    With a distillation term the loss is (1 - alpha) times the supervised terms plus alpha times the distilled
    ones (section 3.3); without one it is the plain sum, so `independent+hierarchical` is the paper's ablation
    L_I + L_H.

    Args:
        name: terms out of `independent` (eq. 9), `hierarchical` (10), `ensemble` (the full one alone), `codistillation`
            (11), `hierarchical_codistillation` (12) and `stepwise_codistillation`, at least one of the first three; or
            `one_for_all` (IMTA), alone or with `hierarchical` or `ensemble`.
        alpha: weight of distillation, from 0 to 1; gamma of `one_for_all`, for which its authors take 0.9.
        temperature: the teacher is softmax(y^E / temperature), detached; the student is not tempered. `one_for_all`
            tempers both; its authors take 3.
        temper_students: divide the students' logits by the temperature as well, and multiply the distilled terms by
            its square, as Hinton et al. (arXiv 1503.02531, section 2) do.
        depth_weights: of the nested ensembles y^0, y^1, ... in the two hierarchical terms; all 1 by default.
        standardize_logits: in the distilled terms, bring the logits of teacher and students to mean 0 and standard
            deviation 1 over classes before they are tempered (Sun et al., CVPR 2024, arXiv 2403.01427); it needs
            `temper_students`, for students that are standardised and not tempered could not be sure of anything.

    Raises:
        ValueError: an unknown or repeated term, distillation alone, alpha, temperature or a weight out of range.

    Examples:
        >>> objective = Objective("independent+hierarchical_codistillation", alpha=0.5)
        >>> loss = objective(torch.zeros(2, 4, 10), torch.tensor([3, 7]))  # 0.5 * 4 ln 10 + 0.5 * 2 ln 10
        >>> round(loss.item(), 4)
        6.9078
    """

    name: str = "independent+hierarchical_codistillation"
    alpha: float = 0.5
    temperature: float = 2.0
    temper_students: bool = False
    depth_weights: tuple[float, ...] = ()
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        terms = self.terms
        known = (*TERMS, ONE_FOR_ALL)
        for term in terms:
            if term not in known:
                close = difflib.get_close_matches(term, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                allowed = ", ".join(known)
                raise ValueError(f"unknown objective {term!r}: the terms are {allowed}, joined by '+'{hint}")
        if len(set(terms)) < len(terms):
            raise ValueError(f"a term stands twice in the objective {self.name!r}.")
        if ONE_FOR_ALL in terms and not set(terms) <= {ONE_FOR_ALL, *_WITH_ONE_FOR_ALL}:
            raise ValueError(f"{ONE_FOR_ALL} has all of {self.name!r} in it but {' and '.join(_WITH_ONE_FOR_ALL)}.")
        if not set(terms) & {*SUPERVISED, ONE_FOR_ALL}:
            labelled = " or ".join(SUPERVISED)
            raise ValueError(f"the objective {self.name!r} never sees a label: add {labelled}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}.")
        _check_temperature(self.temperature)
        if self.standardize_logits and not self.temper_students:
            raise ValueError("standardize_logits tempers teacher and students alike: say temper_students=True as well.")
        if any(not weight >= 0 for weight in self.depth_weights):
            raise ValueError(f"depth_weights must not be negative, got {self.depth_weights}.")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names joined in `name`."""
        return tuple(term.strip() for term in self.name.split("+"))

    @property
    def weighs_leaves(self) -> bool:
        """Whether gradients reach the weights of the leaves in an ensemble, if those are learned."""
        return bool(set(self.terms) & {"hierarchical", "ensemble", *DISTILLED[1:]})

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        if not set(self.terms) & set(DISTILLED):
            return dict.fromkeys(self.terms, 1.0)
        return {term: self.alpha if term in DISTILLED else 1 - self.alpha for term in self.terms}

    def check(self, nesting: Nesting) -> None:
        """Raise a ValueError if the terms do not fit how leaves make up depths."""
        if ONE_FOR_ALL in self.terms and nesting.weights is None and not nesting.alone:
            raise ValueError(
                "one_for_all has the last exit teach the others, and a tree's leaves are peers: codistillation."
            )
        if "ensemble" in self.terms and nesting.alone:
            raise ValueError("exits that answer alone are no ensemble: give exit_weights, or an objective without it.")

    def __call__(
        self, leaf_logits: Logits, target: Target, teacher: Tensor | None = None, nesting: Nesting | None = None
    ) -> Scalar:
        """The loss, a mean over the batch.

        Args:
            leaf_logits: (N, leaves, classes), in any floating-point type.
            target: class indices (N,), or probabilities (N, classes) as mixup gives them. The distilled terms never
                see it: under mixup their teacher is what the full ensemble says of the mixed image itself.
            teacher: logits (N, classes) that take the place of y^E in the distilled terms, as from an average of the
                weights.
            nesting: how leaves make up the nested ensembles, as `model.nesting`; by default as in a tree.

        Raises:
            ValueError: shapes that do not fit each other, or leaves that the terms are not for.
        """
        if nesting is not None:
            self.check(nesting)
        terms = {term: weight for term, weight in self.weights.items() if term not in (ONE_FOR_ALL, STEPWISE)}
        weighed = _Weights(terms, self.depth_weights)
        loss = leaf_logits.new_zeros(())
        if terms:
            how = (self.temperature, self.temper_students, teacher, nesting, self.standardize_logits)
            loss = _fused(leaf_logits, target, weighed, *how)
        if STEPWISE in self.terms:
            given = (self.temperature, self.temper_students, self.standardize_logits, nesting)
            loss = loss + self.alpha * stepwise_codistillation(leaf_logits, None, *given)
        if ONE_FOR_ALL in self.terms:
            loss = loss + one_for_all(leaf_logits, target, self.alpha, self.temperature, teacher)
        return loss


def distillation(leaf_logits: Logits, teacher: Tensor, temperature: float = 2.0) -> Scalar:
    """Every network learns from another model: sum_n T^2 KL(softmax(t / T) || softmax(y_n / T)).

    Hinton et al. (arXiv 1503.02531, section 2), summed over networks as L_I is.

    Args:
        leaf_logits: (N, leaves, classes).
        teacher: the other model's logits t, (N, classes); no gradient flows into them.
        temperature: T, of teacher and students.

    Returns:
        The sum over networks of the divergence, mean over the batch.

    Raises:
        ValueError: shapes that do not fit each other, or a temperature that is not positive.
    """
    _check_images(leaf_logits)
    _check_teacher(leaf_logits, teacher)
    _check_temperature(temperature)
    log_q = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=-1)[:, None]
    log_p = F.log_softmax(at_least_float32(leaf_logits) / temperature, dim=-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum((1, 2)).mean()


@dataclass(frozen=True)
class _Weights:
    """What each term and, within the hierarchical terms, each nested ensemble counts."""

    terms: Mapping[str, float]
    depths: tuple[float, ...] = ()


def _fused(
    leaf_logits: Tensor,
    target: Tensor | None,
    weights: _Weights,
    temperature: float = 1.0,
    temper_students: bool = False,
    teacher: Tensor | None = None,
    nesting: Nesting | None = None,
    standardize: bool = False,
) -> Tensor:
    """The weighted sum of the named terms in one pass over the predictions."""
    _check_images(leaf_logits)
    _check_target(leaf_logits, target)
    _check_temperature(temperature)
    nesting = nesting or Nesting(nested_sizes(leaf_logits.shape[1]))
    nested = nesting(leaf_logits)
    others = [depth for depth, leaf in enumerate(nesting.places) if leaf is None]
    predictions = torch.cat([at_least_float32(leaf_logits), nested[:, others]], dim=1)
    to_labels, to_teacher = _prediction_weights(nesting, weights, predictions)
    log_p = F.log_softmax(predictions, dim=-1)  # (N, predictions, classes)
    loss = log_p.new_zeros(())
    if target is not None and any(term in SUPERVISED for term in weights.terms):
        loss = loss + _cross_entropy(log_p, to_labels, _as_probabilities(target, log_p))
    if any(term in DISTILLED for term in weights.terms):
        if teacher is None:
            teacher = nested[:, -1]
        _check_teacher(leaf_logits, teacher)
        soft = _soft_labels(at_least_float32(teacher), temperature, standardize)
        if temper_students:
            log_p, factor = _students(predictions, temperature, True, standardize)
            to_teacher = to_teacher * factor
        loss = loss + _cross_entropy(log_p, to_teacher, soft)
    return loss


def _soft_labels(teacher: Tensor, temperature: float, standardize: bool) -> Tensor:
    """softmax(t / T), detached; over standardised logits if asked for."""
    logits = teacher.detach()
    return F.softmax((_standardized(logits) if standardize else logits) / temperature, dim=-1)


def _students(logits: Tensor, temperature: float, tempered: bool, standardize: bool) -> tuple[Tensor, float]:
    """The students' log-probabilities and the factor of their loss: T^2 if they are tempered (arXiv 1503.02531)."""
    if not tempered:
        return F.log_softmax(logits, dim=-1), 1.0
    return F.log_softmax((_standardized(logits) if standardize else logits) / temperature, dim=-1), temperature**2


def _standardized(logits: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over classes."""
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True, correction=0) + 1e-7)


def _cross_entropy(log_p: Tensor, weights: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy (N, predictions, classes) to (N, classes), weighted over predictions, mean over N."""
    # No matrix product: autocast would run it in half precision, where a log-probability can overflow.
    weighted = (weights[:, None] * log_p).sum(1)
    return -(weighted * probabilities).sum(-1).mean()


def _prediction_weights(nesting: Nesting, weights: _Weights, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of each prediction's cross-entropy to the labels and to the teacher: leaves, then ensembles."""
    depths, leaves, like = len(nesting.sizes), nesting.sizes[-1], predictions
    if weights.depths and len(weights.depths) != depths:
        raise ValueError(f"depth_weights needs {depths} values, one per depth of {leaves} leaves: {weights.depths}.")
    of_ensembles = like.new_tensor(weights.depths or (1.0,) * depths)
    to_labels, to_teacher = like.new_zeros(like.shape[1]), like.new_zeros(like.shape[1])
    ensembles = count(leaves)
    of_depth = [next(ensembles) if leaf is None else leaf for leaf in nesting.places]  # where each prediction stands
    terms = weights.terms
    to_labels[:leaves] += terms.get("independent", 0.0)
    to_labels[of_depth] += terms.get("hierarchical", 0.0) * of_ensembles
    to_labels[of_depth[-1]] += terms.get("ensemble", 0.0)
    to_teacher[:leaves] += terms.get("codistillation", 0.0)
    to_teacher[of_depth[:-1]] += terms.get("hierarchical_codistillation", 0.0) * of_ensembles[:-1]
    return to_labels, to_teacher


def _as_probabilities(target: Tensor, like: Tensor) -> Tensor:
    if target.ndim == 2:
        return target.to(like)
    return F.one_hot(target, like.shape[-1]).to(like)


def _check_images(leaf_logits: Tensor) -> None:
    check_logits(leaf_logits)
    if not len(leaf_logits):
        raise ValueError("there is no image in the batch, and a loss is a mean over images: leave empty batches out.")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def _check_teacher(leaf_logits: Tensor, teacher: Tensor) -> None:
    wanted = (leaf_logits.shape[0], leaf_logits.shape[2])
    if tuple(teacher.shape) != wanted:
        raise ValueError(f"the teacher's logits must be {wanted} (N, classes), got shape {tuple(teacher.shape)}.")


def _check_target(leaf_logits: Tensor, target: Tensor | None) -> None:
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise ValueError(f"targets must be a tensor, got {target!r}: pass a temperature by name.")
    batch, _, classes = leaf_logits.shape
    shape = tuple(target.shape)
    if shape not in ((batch,), (batch, classes)):
        raise ValueError(f"targets must be ({batch},) or ({batch}, {classes}), got shape {shape}.")
    if target.ndim == 1 and target.is_floating_point():
        raise ValueError("targets (N,) are class indices: whole numbers, not floating-point ones.")
