"""A training objective: a weighted sum of the losses of `hierens.losses`, chosen by name."""

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
                hint = did_you_mean(term, known)
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
        check_temperature(self.temperature)
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

    def check(self, prediction_weights: PredictionWeights) -> None:
        """Raise a ValueError if the terms do not fit how leaves make up depths."""
        if ONE_FOR_ALL in self.terms and prediction_weights.leaf_weights is None and prediction_weights.has_ensembles:
            raise ValueError(
                "one_for_all has the last exit teach the others, and a tree's leaves are peers: codistillation."
            )
        if "ensemble" in self.terms and not prediction_weights.has_ensembles:
            raise ValueError("exits that answer alone are no ensemble: give exit_weights, or an objective without it.")

    def __call__(
        self,
        leaf_logits: Logits,
        target: Target,
        teacher: Tensor | None = None,
        prediction_weights: PredictionWeights | None = None,
    ) -> Scalar:
        """The loss, a mean over the batch.

        Args:
            leaf_logits: (N, leaves, classes), in any floating-point type.
            target: class indices (N,), or probabilities (N, classes) as mixup gives them. The distilled terms never
                see it: under mixup their teacher is what the full ensemble says of the mixed image itself.
            teacher: logits (N, classes) that take the place of y^E in the distilled terms, as from an average of the
                weights.
            prediction_weights: the model's own, `model.prediction_weights`; by default a tree's.

        Raises:
            ValueError: shapes that do not fit each other, or leaves that the terms are not for.
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
            "one_for_all": lambda: losses.one_for_all(leaf_logits, target, alpha, temperature, teacher),
        }
        weighted = [weight * terms[term]() for term, weight in self.weights.items()]
        return torch.stack(weighted).sum()
