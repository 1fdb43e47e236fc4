"""Weights of exits in an ensemble: by name or by number, fixed or learned.

Weighted ensembles of exits are from AEP (Sarti et al., arXiv 2301.12168), of which only the abstract was at hand: the
names, the formulas and the way in which weights are learned are our interpretation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hierens.core.errors import did_you_mean
from hierens.core.predictions import Average

Prior = Literal["uniform", "linear_rising", "linear_falling", "geometric_rising", "geometric_falling"]
PRIORS: tuple[str, ...] = get_args(Prior)


def prior(weights: Prior | str | Sequence[float], exits: int) -> tuple[float, ...]:
    """Weights by name, with a sum of 1.

    Args:
        weights: `uniform`; `linear_rising`, proportional to 1, 2, 3, ... from the first exit, or `linear_falling`, from
            the last; `geometric_rising`, proportional to 1, 2, 4, ..., or `geometric_falling`; or a number per exit.
        exits: number of exits.

    Raises:
        ValueError: an unknown name, a wrong number of weights, or weights that are not positive.

    Examples:
        >>> prior("linear_rising", 4), prior("geometric_falling", 2)
        ((0.1, 0.2, 0.3, 0.4), (0.6666666666666666, 0.3333333333333333))
    """
    if isinstance(weights, str):
        if weights not in PRIORS:
            raise ValueError(
                f"there are no weights {weights!r}{did_you_mean(weights, PRIORS)}: choose {', '.join(PRIORS)}, or "
                "give a number per exit."
            )
        shape, _, end = weights.partition("_")
        values = [{"uniform": 1.0, "linear": 1.0 + i, "geometric": 2.0**i}[shape] for i in range(exits)]
        values = values[::-1] if end == "falling" else values
    else:
        values = [float(value) for value in weights]
    if len(values) != exits or not all(0 < value < float("inf") for value in values):
        raise ValueError(
            f"weights must be {exits} positive numbers, one per exit (prune removes exits), got {weights}."
        )
    return tuple(value / sum(values) for value in values)


class ExitWeights(nn.Module):
    """The weights of an ensemble's exits, as the softmax of logits that may be learned.

    Args:
        weights: positive; initial values, or fixed ones.
        learn: whether training changes them (our interpretation of AEP's learned weights; of its hybrid ones if
            `weights` are not uniform).
        average: what is averaged, as for `PredictionWeights`.

    Raises:
        ValueError: an unknown average.
    """

    def __init__(self, weights: Sequence[float], learn: bool, average: Average = "logits") -> None:
        super().__init__()
        if average not in get_args(Average):
            raise ValueError(f"average must be 'logits' or 'probabilities', got {average!r}.")
        self.learn, self.average = learn, average
        logits = torch.tensor(weights, dtype=torch.float64).log()
        logits = (logits - logits.mean()).to(torch.get_default_dtype())
        if learn:
            self.logits: Tensor = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)

    def forward(self) -> Tensor:
        """Weights with a sum of 1, (exits,)."""
        return torch.softmax(self.logits, 0)

    def keep(self, exits: Sequence[int]) -> None:
        """Keep only the weights of these exits, in the same ratios."""
        kept = self.logits.detach()[list(exits)].clone()
        self.logits = nn.Parameter(kept) if self.learn else kept
