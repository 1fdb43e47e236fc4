"""The base class of policies, its result, and the simplest policy: a fixed depth."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hierens.core.json_files import is_finite, is_whole, short
from hierens.core.protocol import AdaptiveModel

_LARGEST = 10**6  # of whole numbers


@dataclass(frozen=True)
class Prediction:
    """A prediction and its cost.

    Attributes:
        logits: (N, classes).
        leaves: networks (or exits) evaluated for each image, (N,).
        macs: multiply-accumulates for each image, (N,).
    """

    logits: Tensor
    leaves: Tensor
    macs: Tensor


@dataclass(frozen=True)
class Policy(ABC):
    """Decides how many networks are evaluated."""

    kind: ClassVar[str]

    @torch.no_grad()
    def __call__(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        """Predict the classes of images (N, C, H, W).

        Raises:
            ValueError: the model is in training mode, or does not have the depths that the policy needs.
        """
        check_evaluating(model)
        return self._predict(model, images)

    @abstractmethod
    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction: ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `hierens.inference.policies.from_dict` reads."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"policy": self.kind, **json.loads(json.dumps(values))}


@dataclass(frozen=True)
class FixedDepth(Policy):
    """Always evaluates the first 2^depth networks, or the given number of `leaves`; all networks by default.

    Args:
        depth: of the sub-tree.
        leaves: number of networks, instead of a depth.

    Raises:
        ValueError: a value is not a whole number, or both are given.
    """

    depth: int | None = None
    leaves: int | None = None
    kind: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        check_whole(self, 0, "depth")
        check_whole(self, 1, "leaves")
        if self.depth is not None and self.leaves is not None:
            raise ValueError(f"give depth or leaves, not both (got depth={self.depth}, leaves={self.leaves}).")

    def _predict(self, model: AdaptiveModel, images: Tensor) -> Prediction:
        leaves = model.leaves_at(self.depth, self.leaves)
        return same_cost(model, images, model(images, leaves=leaves), leaves)


def same_cost(model: AdaptiveModel, images: Tensor, logits: Tensor, leaves: int) -> Prediction:
    """A prediction for which the same leaves were evaluated for all images."""
    cost = model.cost(leaves, tuple(images.shape[1:]))
    ones = torch.ones(len(images), dtype=torch.int64)
    return Prediction(logits, ones * leaves, ones * cost)


def check_evaluating(model: AdaptiveModel) -> None:
    """Refuse a model in training mode. Changing its mode for one call would change it for other threads as well."""
    if model.training:
        raise ValueError("policies need evaluation mode, and the model is in training mode: call model.eval().")


def check_whole(policy: Policy, least: int, *names: str, most: int = _LARGEST) -> None:
    """Refuse fields that are neither None nor a whole number in a range."""
    for name in names:
        value = getattr(policy, name)
        if value is not None and not is_whole(value, least, most):
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {short(value)}.")


def check_positive(policy: Policy, *names: str) -> None:
    """Refuse fields that are neither None nor a positive, finite number."""
    for name in names:
        value = getattr(policy, name)
        if value is not None and not (is_finite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {short(value)}: a finite number above 0.")


def check_table(policy: Policy, name: str, valid: Callable[[Any], bool]) -> int:
    """Refuse a field that is not rows of equal length of valid numbers; returns this length, 0 without rows."""
    table = getattr(policy, name)
    listed = isinstance(table, list | tuple) and all(isinstance(row, list | tuple) for row in table)
    if not listed or len({len(row) for row in table}) > 1 or not all(valid(value) for row in table for value in row):
        raise ValueError(f"{name} must be rows of equal length of numbers in their range, got {short(table)}.")
    return len(table[0]) if table else 0
