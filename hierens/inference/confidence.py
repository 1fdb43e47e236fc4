"""Early exiting by confidence: each image leaves at the first depth whose prediction is certain enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hierens.core.json_files import is_finite, short
from hierens.core.labels import check_classes
from hierens.core.protocol import AdaptiveModel
from hierens.evaluation.uncertainty import Measure, certainty, check_measure
from hierens.inference.policy import Policy, Prediction

_MOST_THRESHOLDS = 4096
NOBODY, EVERYBODY = 2.0, -1.0  # thresholds outside the range of certainties; unlike infinities, JSON can hold them


@dataclass(frozen=True)
class Confidence(Policy):
    """Each image leaves at the first depth whose prediction is certain enough; the batch shrinks on the way.

    After the first 1, 2, 4, ... networks, the certainty of each prediction is compared with the threshold of that
    depth. Images below the threshold continue with the activations computed so far. All leave at the last depth.

    Args:
        thresholds: one for each depth below the full one, from 0 to 1 for every measure; the last one is used for all
            that are missing. With `NOBODY` (2) no image leaves at a depth, with `EVERYBODY` (-1) all do.
        measure: see `hierens.evaluation.uncertainty.certainty`; the networks are those evaluated so far.

    Raises:
        ValueError: no threshold, a threshold outside the range of certainties, or an unknown measure; when called,
            more thresholds than the model has depths below the full one, or dense predictions.
    """

    thresholds: tuple[float, ...]
    measure: Measure = "probability"
    kind: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        listed = isinstance(self.thresholds, Sequence) and not isinstance(self.thresholds, str)
        if not listed or len(self.thresholds) > _MOST_THRESHOLDS or not all(map(is_finite, self.thresholds)):
            raise ValueError(f"thresholds must be 1 to {_MOST_THRESHOLDS} numbers, got {short(self.thresholds)}.")
        object.__setattr__(self, "thresholds", tuple(float(value) for value in self.thresholds))
        if not self.thresholds:
            raise ValueError(f"thresholds must be at least one number, got {self.thresholds}.")
        if wrong := [value for value in self.thresholds if not 0 <= value <= 1 and value not in (NOBODY, EVERYBODY)]:
            raise ValueError(
                f"thresholds are compared with certainties, which are from 0 to 1, got {wrong[0]} (write 0.9, not 90; "
                f"with {NOBODY:g} no image leaves, with {EVERYBODY:g} all do)."
            )
        check_measure(self.measure)

    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        check_classes(model, "a policy by confidence")
        sizes = model.sizes
        if len(self.thresholds) > max(len(sizes) - 1, 1):
            raise ValueError(
                f"{len(self.thresholds)} thresholds are for a model of {len(self.thresholds) + 1} depths, and this one "
                f"has {len(sizes)}: give at most one for each depth below the full one (the last one is used for the "
                "depths without one)."
            )
        rows = torch.arange(len(images), device=images.device)
        leaves, macs = torch.zeros(len(images), dtype=torch.int64), torch.zeros(len(images), dtype=torch.int64)
        votes: list[Tensor] = []
        walk = model.anytime(images)
        step = next(walk)
        if step.logits.ndim != 2:
            raise ValueError(
                "confidence thresholds need one prediction per image, but this model predicts a class for every pixel: "
                "use a policy that chooses the depth of a whole batch, such as FixedDepth."
            )
        logits = torch.empty_like(step.logits)
        while True:
            votes.append(step.newest.argmax(-1))
            if step.leaves not in sizes:
                step = next(walk)
                continue
            depth = sizes.index(step.leaves)
            if depth == len(sizes) - 1:
                done = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            else:
                threshold = self.thresholds[min(depth, len(self.thresholds) - 1)]
                done = certainty(step.logits, torch.stack(votes, 1), self.measure) >= threshold
            logits[rows[done]] = step.logits[done]
            leaves[rows[done].cpu()], macs[rows[done].cpu()] = step.leaves, step.macs
            kept = (~done).nonzero().flatten()
            if not len(kept):
                walk.close()
                return Prediction(logits, leaves, macs)
            rows, votes = rows[kept], [vote[kept] for vote in votes]
            step = walk.send(kept) if len(kept) < len(done) else next(walk)
