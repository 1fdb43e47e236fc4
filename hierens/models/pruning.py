"""Removes exits with small weights from an ensemble of exits, and the blocks that only they need.

AEP (arXiv 2301.12168) prunes inside weighted ensembles of exits; the rule here is our interpretation of its abstract.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from hierens.core.modes import evaluating
from hierens.evaluation.profiling import latency, millions, table
from hierens.inference.calibration import collect
from hierens.models.adaptive import Adaptive


class WeightedExits(Adaptive):
    """A network with exits that may have weights, the input of `prune`; `MultiExit` is one."""

    @property
    @abstractmethod
    def weights(self) -> Tensor | None:
        """Weights of the exits, (exits,), with a sum of 1; None if the exits are not combined."""

    @property
    @abstractmethod
    def collaborate(self) -> bool:
        """Whether each exit also reads the logits of the exit before."""

    @abstractmethod
    def keep_exits(self, exits: Iterable[int]) -> Self:
        """A new model with some of the exits, and without blocks after the last of them."""


Exits = TypeVar("Exits", bound=WeightedExits)


@dataclass(frozen=True)
class Cost:
    """The cost of a whole model.

    Attributes:
        exits: number of exits.
        parameters: number of weights.
        macs: multiply-accumulates per image.
        latency_ms: median time for one image, in milliseconds.
    """

    exits: int
    parameters: int
    macs: int
    latency_ms: float


@dataclass(frozen=True)
class Pruning(Generic[Exits]):
    """The result of `prune`; prints as a table of the savings.

    Attributes:
        model: the smaller model.
        kept: exits of the former model that it has.
        before: cost of the former model.
        after: cost of the smaller model.
    """

    model: Exits
    kept: tuple[int, ...]
    before: Cost
    after: Cost

    def __str__(self) -> str:
        """A table of the costs before and after, and the share that was saved."""
        shown: dict[str, Callable[[Any], str]] = {"exits": str, "latency_ms": "{:.2f}".format}
        rows = []
        for field in fields(Cost):
            old, new = getattr(self.before, field.name), getattr(self.after, field.name)
            show = shown.get(field.name, millions)
            rows.append((field.name, show(old), show(new), f"{1 - new / old:.0%}"))
        return table(("", "before", "after", "saved"), rows)


def prune(
    model: Exits, tolerance: float = 0.01, batches: Iterable[tuple[Tensor, Tensor]] | None = None
) -> Pruning[Exits]:
    """Remove exits with negligible weights, and everything after the last exit that is kept.

    The output is exactly that of the ensemble of the exits that are kept, with weights scaled to a sum of 1. Exits that
    collaborate need the exits before them, so only the last ones can be removed.

    Args:
        model: an ensemble of exits; it is not changed.
        tolerance: exits whose weight is below it are removed, from 0 (none) to below 1; the one with the largest weight
            is kept.
        batches: held-out images (N, C, H, W) and class indices (N,). If given, exits after the most accurate depth of
            the ensemble are removed as well.

    Raises:
        ValueError: the exits have no weights, or the tolerance is out of range.
    """
    weights = model.weights
    if weights is None:
        raise ValueError("these exits are not combined and have no weights: use at_depth or keep_exits.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be from 0 to below 1, got {tolerance}.")
    shares = weights.detach()
    useful = {int(shares.argmax()), *(shares >= tolerance).nonzero().flatten().tolist()}
    last = max(useful)
    if batches is not None:
        held_out = collect(model, batches)
        correct = (held_out.logits.argmax(-1) == held_out.labels[:, None]).sum(0).tolist()
        last = min(last, correct.index(max(correct)))
    kept = tuple(exit for exit in range(last + 1) if exit in useful or model.collaborate) or (last,)
    pruned = model.keep_exits(kept)
    return Pruning(pruned, kept, _cost(model), _cost(pruned))


def _cost(model: WeightedExits) -> Cost:
    like = next(model.parameters())
    image = torch.zeros(1, *model.pretrained_cfg["input_size"], device=like.device, dtype=like.dtype)
    with evaluating(model):
        latency_ms = latency(model, image, model.depths - 1)
    return Cost(model.leaves, model.parameter_counts()[-1], model.macs()[-1], latency_ms)
