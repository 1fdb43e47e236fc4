"""Gradient equilibrium (Li et al., ICCV 2019, arXiv 1908.06294, section 3.1), for trees.

Where several losses share layers, the gradients of the shared ones add up, so the more losses there are behind a layer,
the larger and the more variable its steps. In a tree of N leaves the first block gets the sum of N gradients and a
leaf's own block a single one. Scaling the gradient by 1 / k wherever a branch forks into k leaves every branch with the
mean over the leaves below it. Where a branch with n answers behind it hands on to an exit and to branches with some of
them, each gets its share: 1 / n to the exit, m / n to a branch with m.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hierens.core.values import each


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The tensor itself; its gradient is multiplied by a factor.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(x, 0.25).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.2500])
    """
    return _Scaled.apply(x, factor)


def scaled(value: Any, factor: float) -> Any:
    """What a block hands on, a tensor or several; the gradients of those that have any are multiplied by a factor."""
    return each(partial(scale_gradient, factor=factor), value)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
