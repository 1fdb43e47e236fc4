"""Gradient equilibrium (Li et al., ICCV 2019, arXiv 1908.06294, section 3.1), for trees.

If several losses share layers, the gradients of shared layers add up: the more losses depend on a layer, the larger and
more variable are its updates. In a tree of N leaves, the first block receives the sum of N gradients, and a leaf's own
block a single one. If the gradient is scaled by 1 / k wherever a branch has k children, every branch receives the mean
over its leaves. If an exit and child branches read a branch with n predictions below it, the gradient of the exit is
scaled by 1 / n, and that of a child with m predictions by m / n.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hierens.core.block_values import each


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The identity in the forward pass; the gradient is multiplied by a factor.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(x, 0.25).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.2500])
    """
    return _Scaled.apply(x, factor)


def scaled(value: Any, factor: float) -> Any:
    """A block's output, one or several tensors; the gradients of floating-point tensors are multiplied by a factor."""
    return each(partial(scale_gradient, factor=factor), value)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
