"""`Objective`: a training loss, given by name as a weighted sum of the losses in `hierens.losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hierens import losses
from hierens.core.errors import did_you_mean
from hierens.core.predictions import PredictionWeights
from hierens.losses import check_temperature

if TYPE_CHECKING:
    from hierens.losses import Logits, Scalar, Target

SUPERVISED = ("independent", "hierarchical", "ensemble")
DISTILLED = ("codistillation", "hierarchical_codistillation", "stepwise_codistillation")
TERMS = SUPERVISED + DISTILLED
ONE_FOR_ALL, STEPWISE = "one_for_all", "stepwise_codistillation"
_WITH_ONE_FOR_ALL = ("hierarchical", "ensemble")


@dataclass(frozen=True)
class Objective:
    """A loss by name: terms joined by `+`.

    With a distillation term, the loss is (1 - alpha) times the supervised terms plus alpha times the distillation
    terms (section 3.3). Without one it is the plain sum: `independent+hierarchical` is the paper's ablation L_I + L_H.

    Args:
        name: terms out of `independent` (eq. 9), `hierarchical` (10), `ensemble` (only the full one), `codistillation`
            (11), `hierarchical_codistillation` (12) and `stepwise_codistillation`, at least one of the first three; or
            `one_for_all` (IMTA), alone or with `hierarchical` or `ensemble`.
        alpha: weight of distillation, from 0 to 1; gamma of `one_for_all`, 0.9 in its paper.
        temperature: the teacher is softmax(y^E / temperature), detached; the student has temperature 1. `one_for_all`
            applies it to both, with 3 in its paper.
        temper_students: divide the students' logits by the temperature as well, and multiply the distillation terms by
            its square, as in Hinton et al. (arXiv 1503.02531, section 2).
        depth_weights: weights of the nested ensembles y^0, y^1, ... in the two hierarchical terms; all 1 by default.
        standardize_logits: in the distillation terms, standardise the logits of teacher and students to mean 0 and
            standard deviation 1 over classes before the temperature is applied (Sun et al., CVPR 2024, arXiv
            2403.01427). Requires `temper_students`: standardised logits without a temperature cannot give
            probabilities near 1.
        mean_over_classes: in `one_for_all`, average the divergence over the classes instead of summing it, as its
            authors' code does: gamma T^2 / classes is then the weight of the distillation.

    Raises:
        ValueError: a term is unknown or repeated, there is no supervised term, or a number is out of range.

    Examples:
        >>> objective = Objective("independent+hierarchical_codistillation", alpha=0.5)
        >>> loss = objective(torch.zeros(2, 4, 10), torch.tensor([3, 7]))  # 0.5 * 4 ln 10 + 0.5 * 2 ln 10
        >>> round(loss.item(), 4)
        6.9078
    """

    name: str = "hierarchical+hierarchical_codistillation"
    alpha: float = 0.5
    temperature: float = 2.0
    temper_students: bool = False
    depth_weights: tuple[float, ...] = ()
    standardize_logits: bool = False
    mean_over_classes: bool = False

    def __post_init__(self) -> None:
        terms = self.terms
        known = (*TERMS, ONE_FOR_ALL)
        for term in terms:
            if term not in known:
                hint = did_you_mean(term, known)
                allowed = ", ".join(known)
                raise ValueError(f"unknown objective {term!r}: the terms are {allowed}, joined by '+'{hint}")
        if len(set(terms)) < len(terms):
            raise ValueError(f"the objective {self.name!r} repeats a term: name each once.")
        if ONE_FOR_ALL in terms and not set(terms) <= {ONE_FOR_ALL, *_WITH_ONE_FOR_ALL}:
            allowed = " and ".join(_WITH_ONE_FOR_ALL)
            raise ValueError(f"{ONE_FOR_ALL} can only be combined with {allowed}, got {self.name!r}.")
        if not set(terms) & {*SUPERVISED, ONE_FOR_ALL}:
            labelled = " or ".join(SUPERVISED)
            raise ValueError(f"the objective {self.name!r} does not use labels: add {labelled}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}.")
        check_temperature(self.temperature)
        if self.standardize_logits and not self.temper_students:
            raise ValueError("standardize_logits requires temper_students=True.")
        if self.mean_over_classes and ONE_FOR_ALL not in terms:
            raise ValueError(f"mean_over_classes is for one_for_all, and the objective is {self.name!r}.")
        if any(not weight >= 0 for weight in self.depth_weights):
            raise ValueError(f"depth_weights must not be negative, got {self.depth_weights}.")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names joined in `name`."""
        return tuple(term.strip() for term in self.name.split("+"))

    @property
    def weighs_leaves(self) -> bool:
        """Whether learned weights of the leaves in an ensemble receive gradients."""
        return bool(set(self.terms) & {"hierarchical", "ensemble", *DISTILLED[1:]})

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        if not set(self.terms) & set(DISTILLED):
            return dict.fromkeys(self.terms, 1.0)
        return {term: self.alpha if term in DISTILLED else 1 - self.alpha for term in self.terms}

    def check(self, prediction_weights: PredictionWeights) -> None:
        """Raise a ValueError if the terms do not fit the kind of network, given by its prediction weights."""
        if ONE_FOR_ALL in self.terms and prediction_weights.leaf_weights is None and prediction_weights.has_ensembles:
            raise ValueError(
                "one_for_all takes the last exit as the teacher, and a tree has no last exit: use codistillation."
            )
        if "ensemble" in self.terms and not prediction_weights.has_ensembles:
            raise ValueError("these exits are not combined in an ensemble: set exit_weights, or omit 'ensemble'.")

    def __call__(
        self,
        leaf_logits: Logits,
        target: Target,
        teacher: Tensor | None = None,
        prediction_weights: PredictionWeights | None = None,
    ) -> Scalar:
        """The loss, a mean over the batch, and over the pixels of dense predictions.

        Args:
            leaf_logits: (N, leaves, classes) or (N, leaves, classes, H, W), in any floating-point type.
            target: class indices (N,), or probabilities (N, classes), as from mixup, or (N, H, W) and
                (N, classes, H, W). The distillation terms do not use it: with mixup, their teacher is the full
                ensemble's prediction for the mixed image.
            teacher: logits (N, classes) or (N, classes, H, W) that replace y^E in the distillation terms, for example
                of averaged weights.
            prediction_weights: `model.prediction_weights`; by default those of a tree.

        Raises:
            ValueError: shapes do not match, or the terms do not fit the kind of network.
        """
        if prediction_weights is not None:
            self.check(prediction_weights)
        soft = losses.Softening(
            teacher=teacher,
            prediction_weights=prediction_weights,
            temper_students=self.temper_students,
            standardize=self.standardize_logits,
        )
        alpha, temperature, depth_weights = self.alpha, self.temperature, self.depth_weights
        terms: dict[str, Callable[[], Tensor]] = {
            "independent": lambda: losses.independent(leaf_logits, target),
            "hierarchical": lambda: losses.hierarchical(leaf_logits, target, prediction_weights, depth_weights),
            "ensemble": lambda: losses.ensemble(leaf_logits, target, prediction_weights),
            "codistillation": lambda: losses.codistillation(leaf_logits, target, temperature, **soft),
            "hierarchical_codistillation": lambda: losses.hierarchical_codistillation(
                leaf_logits, target, temperature, depth_weights, **soft
            ),
            "stepwise_codistillation": lambda: losses.stepwise_codistillation(leaf_logits, target, temperature, **soft),
            "one_for_all": lambda: losses.one_for_all(
                leaf_logits, target, alpha, temperature, teacher, self.mean_over_classes
            ),
        }
        weighted = [weight * terms[term]() for term, weight in self.weights.items()]
        return torch.stack(weighted).sum()
