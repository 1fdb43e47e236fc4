"""Nested predictions: what the first few answers of a network say together.

A tree's answers are its leaves, a multi-exit network's its exits; both are called leaves where it makes no difference.
Whoever needs the prediction of a depth (losses, metrics, calibration) asks here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Nesting:
    """How leaf logits become the predictions of depths 0, 1, ...

    The prediction of depth b is the mean over the first `sizes[b]` leaves, weighted if there are weights. Weights are
    brought to a sum of 1 over the leaves so far, so that the logits of every depth are of the same scale and a network
    that is cut short answers as the whole one did on the way.

    Attributes:
        sizes: leaves of every depth.
        weights: positive, one per leaf that is not early; all the same by default.
        early: the first so many leaves answer by themselves, as exits without an ensemble do, and have no part in the
            mean over the others.

    Examples:
        >>> leaf_logits = torch.tensor([[[0.0], [4.0], [8.0]]])  # one image, three leaves, one class
        >>> Nesting((1, 2, 3))(leaf_logits).flatten().tolist()
        [0.0, 2.0, 4.0]
        >>> Nesting((1, 2, 3), torch.tensor([1.0, 1.0, 2.0]))(leaf_logits).flatten().tolist()
        [0.0, 2.0, 5.0]
        >>> Nesting((1, 2, 3), early=3)(leaf_logits).flatten().tolist()
        [0.0, 4.0, 8.0]
        >>> Nesting((1, 2, 3), early=1)(leaf_logits).flatten().tolist()
        [0.0, 4.0, 6.0]
        >>> Nesting((1, 2, 3), torch.tensor([1.0, 3.0]), early=1).of_first(3)(leaf_logits).flatten().tolist()
        [7.0]
    """

    sizes: tuple[int, ...]
    weights: Tensor | None = None
    early: int = 0

    def __call__(self, leaf_logits: Tensor) -> Tensor:
        """Nested predictions, (N, depths, classes).

        Args:
            leaf_logits: (N, leaves, classes); half precision is summed in float32.

        Raises:
            ValueError: logits of another shape or type, or of too few leaves.
        """
        check_logits(leaf_logits)
        if leaf_logits.shape[1] != self.sizes[-1]:
            raise ValueError(f"expected logits of {self.sizes[-1]} leaves, got {leaf_logits.shape[1]}.")
        logits = at_least_float32(leaf_logits)
        by_themselves = [n - 1 for n in self.sizes if n <= self.early]
        sizes = torch.tensor([n - self.early for n in self.sizes if n > self.early], device=logits.device)
        if not len(sizes):
            return logits[:, by_themselves]
        together = logits[:, self.early :]
        if self.weights is None:
            nested = together.cumsum(1)[:, sizes - 1] / sizes[:, None]
        else:
            weights = self.weights.to(logits)
            nested = (together * weights[:, None]).cumsum(1)[:, sizes - 1] / weights.cumsum(0)[sizes - 1, None]
        return torch.cat([logits[:, by_themselves], nested], 1) if by_themselves else nested

    @property
    def alone(self) -> bool:
        """Whether no two leaves ever answer together."""
        return self.early >= self.sizes[-1]

    @property
    def places(self) -> list[int | None]:
        """The leaf that is the prediction of each depth by itself, if one is: not to be computed twice."""
        return [n - 1 if n <= self.early + 1 else None for n in self.sizes]

    def together(self, size: int) -> slice:
        """The leaves whose answers the prediction of the first so many is made of, or is beside where it is one's."""
        return slice(self.early if size > self.early else 0, size)

    def of_first(self, leaves: int) -> Nesting:
        """What the first so many leaves say, as a single prediction."""
        weighed = max(leaves - self.early, 0)
        return replace(self, sizes=(leaves,), weights=None if self.weights is None else self.weights[:weighed])

    def cpu(self) -> Nesting:
        """The same with weights on the CPU, without gradients."""
        return replace(self, weights=None if self.weights is None else self.weights.detach().cpu())


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision made single."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_logits(leaf_logits: Tensor) -> None:
    """Raise a ValueError unless these are leaf logits (N, leaves, classes)."""
    shape = tuple(leaf_logits.shape)
    if leaf_logits.ndim != 3 or not leaf_logits.is_floating_point():
        raise ValueError(
            "leaf logits must be floating-point (N, leaves, classes), got "
            f"{leaf_logits.dtype} of shape {shape}: call the model with reduce=False."
        )
    if shape[1] == 0:
        raise ValueError(f"leaf logits must hold at least one leaf, got shape {shape}.")
