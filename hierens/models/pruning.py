"""Fewer exits, same ensemble: what hardly counts is left out, and with it the blocks that nothing else needs (AEP)."""

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
    """A chain of exits that may have weights: what `prune` takes, and `MultiExit` is."""

    @property
    @abstractmethod
    def weights(self) -> Tensor | None:
        """Weights of the ensemble's exits, (exits,), with a sum of 1; None if each answers alone."""

    @property
    @abstractmethod
    def collaborate(self) -> bool:
        """Whether an exit also sees what the one before said."""

    @abstractmethod
    def keep_exits(self, exits: Iterable[int]) -> Self:
        """A model of its own with some of the exits, and no blocks behind the last of them."""


Exits = TypeVar("Exits", bound=WeightedExits)


@dataclass(frozen=True)
class Cost:
    """What a whole model costs.

    Attributes:
        exits: how many it has.
        parameters: weights.
        macs: multiply-accumulates per image.
        latency_ms: median time for one image, in milliseconds.
    """

    exits: int
    parameters: int
    macs: int
    latency_ms: float


@dataclass(frozen=True)
class Pruning(Generic[Exits]):
    """A model without the exits that hardly counted; printed, a table of what that saved.

    Attributes:
        model: the smaller model.
        kept: exits of the former model that it has.
        before: what the former model cost.
        after: what it costs.
    """

    model: Exits
    kept: tuple[int, ...]
    before: Cost
    after: Cost

    def __str__(self) -> str:
        """A table: before, after, and the share that was saved."""
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
    """Leave out exits of negligible weight, and what lies behind the last useful one.

    The result answers exactly as the ensemble of the exits that are kept, their weights brought to a sum of 1. Exits
    that collaborate see the one before, so then only the last ones can go.

    Args:
        model: an ensemble of exits; it is left as it is.
        tolerance: exits whose share of the weights is below it go, from 0 (none does) to 1; the heaviest stays.
        batches: held-out images (N, C, H, W) and class indices (N,): exits beyond the depth at which the ensemble
            answers best go as well.

    Raises:
        ValueError: the exits have no weights, or a tolerance out of range.
    """
    weights = model.weights
    if weights is None:
        raise ValueError("these exits answer alone and have no weights to prune by: use at_depth, or keep_exits.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be from 0 to below 1, got {tolerance}.")
    shares = weights.detach()
    heavy = {int(shares.argmax()), *(shares >= tolerance).nonzero().flatten().tolist()}
    last = max(heavy)
    if batches is not None:
        answers = collect(model, batches)
        right = (answers.logits.argmax(-1) == answers.labels[:, None]).sum(0).tolist()
        last = min(last, right.index(max(right)))
    kept = tuple(exit for exit in range(last + 1) if exit in heavy or model.collaborate) or (last,)
    pruned = model.keep_exits(kept)
    return Pruning(pruned, kept, _cost(model), _cost(pruned))


def _cost(model: WeightedExits) -> Cost:
    like = next(model.parameters())
    image = torch.zeros(1, *model.pretrained_cfg["input_size"], device=like.device, dtype=like.dtype)
    with evaluating(model):
        taken = latency(model, image, model.depths - 1)
    return Cost(model.leaves, model.parameter_counts()[-1], model.macs()[-1], taken)
