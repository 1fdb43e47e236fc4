"""`Tree`: the arithmetic of a tree of branches: levels, widths, leaves, nested ensembles and cost; without torch.

Level l holds independent copies (branches) of block l; a branch of the last level is a leaf, one network of the
ensemble. Siblings are adjacent, so the first n leaves need only the first branches of each level; the number of these
is the level's *width* for n leaves. No other module computes a width or a parent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def nested_sizes(leaves: int) -> tuple[int, ...]:
    """Networks in the nested ensembles of depths 0, 1, ...: 1, 2, 4, ... and all of them.

    Examples:
        >>> nested_sizes(8), nested_sizes(5)
        ((1, 2, 4, 8), (1, 2, 4, 5))
    """
    depths = (leaves - 1).bit_length() + 1
    return tuple(min(2**depth, leaves) for depth in range(depths))


def checked_integer(name: str, value: Any, least: int, most: int | None = None, among: str = "") -> int:
    """An argument that must be an integer within bounds.

    Args:
        name: of the argument.
        value: of the argument.
        least: the smallest allowed value.
        most: the largest allowed value, if there is one.
        among: said after the bounds.

    Raises:
        ValueError: it is none, or out of bounds.
    """
    integer = type(value) is int or (hasattr(value, "__index__") and not isinstance(value, bool))
    if not integer or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}{among}"
        raise ValueError(f"{name} must be {'' if integer else 'an integer, '}{bounds}, got {value!r}.")
    return value


def leaves_at(sizes: Sequence[int], depth: int | None = None, leaves: int | None = None) -> int:
    """The number of leaves to run: those of a depth (eq. 5), a given number, or all.

    Args:
        sizes: leaves of every depth.
        depth: index of a size.
        leaves: a number of leaves, instead of a depth.

    Raises:
        ValueError: both are given, or one is not an integer or out of range.
    """
    if depth is not None and leaves is not None:
        raise ValueError(f"give depth or leaves, not both (got depth={depth}, leaves={leaves}).")
    if depth is not None:
        return sizes[checked_integer("depth", depth, 0, len(sizes) - 1, f" for {sizes[-1]} leaves")]
    return sizes[-1] if leaves is None else checked_integer("leaves", leaves, 1, sizes[-1])


@dataclass(frozen=True)
class Tree:
    """A tree of branches, reduced to its first `leaves` leaves.

    Args:
        branching: per level, the children of each branch of the level above; the first entry is the number of roots.
            `(1, 2, 2, 2)` is the paper's binary tree of 4 blocks and 8 networks.
        leaves: number of networks, all by default.

    Raises:
        ValueError: `branching` is empty or has a value below 1, or `leaves` is out of range.

    Examples:
        >>> Tree.binary(4).widths(leaves=2)
        (1, 1, 1, 2)
    """

    branching: tuple[int, ...]
    leaves: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "branching", tuple(self.branching))
        if not self.branching or any(not isinstance(f, int) or f < 1 for f in self.branching):
            raise ValueError(f"branching must be integers of at least 1, one per level, got {self.branching}.")
        total = math.prod(self.branching)
        if self.leaves == 0:
            object.__setattr__(self, "leaves", total)
        checked_integer("leaves", self.leaves, 1, total, f" for branching {self.branching}")

    @classmethod
    def binary(cls, blocks: int) -> Tree:
        """The paper's tree: `blocks` = B + 1 levels, level l with 2^l branches (eq. 4).

        Raises:
            ValueError: fewer than one block, or not an integer.
        """
        return cls((1,) + (2,) * (checked_integer("blocks", blocks, 1) - 1))

    @property
    def levels(self) -> int:
        """Number of levels, B + 1."""
        return len(self.branching)

    @property
    def depths(self) -> int:
        """Number of nested ensembles, one per depth."""
        return len(nested_sizes(self.leaves))

    def span(self, level: int) -> int:
        """Leaves below one branch of a level, in the tree with all leaves."""
        return math.prod(self.branching[level + 1 :])

    def width(self, level: int, leaves: int | None = None) -> int:
        """Branches of a level that the first `leaves` leaves need: ceil(n / span)."""
        return -(-(self.leaves if leaves is None else leaves) // self.span(level))

    def widths(self, leaves: int | None = None) -> tuple[int, ...]:
        """The width of every level for the first `leaves` leaves."""
        return tuple(self.width(level, leaves) for level in range(self.levels))

    def parent(self, level: int, branch: int) -> int:
        """The branch of the level above that a branch reads; 0, for the input, on level 0."""
        return branch // self.branching[level] if level else 0

    def first_new_level(self, leaf: int) -> int:
        """The first level whose branch a depth-first walk has not computed before `leaf`."""
        return next(level for level in range(self.levels) if leaf % self.span(level) == 0)

    def leaves_at(self, depth: int | None = None, leaves: int | None = None) -> int:
        """The number of leaves to run: see `leaves_at`."""
        return leaves_at(nested_sizes(self.leaves), depth, leaves)

    def prefix(self, leaves: int) -> Tree:
        """The sub-tree of the first `leaves` leaves."""
        return Tree(self.branching, self.leaves_at(leaves=leaves))

    def cost(self, block_costs: Sequence[float], leaves: int | None = None) -> float:
        """Cost of the first `leaves` leaves; for equal blocks and all leaves (2^(B+1) - 1) C, eq. 6.

        Examples:
            >>> Tree.binary(4).cost([1, 1, 1, 1])
            15
        """
        return sum(width * cost for width, cost in zip(self.widths(leaves), block_costs, strict=True))

    def independent_cost(self, block_costs: Sequence[float], leaves: int | None = None) -> float:
        """Cost of as many independent networks: (B+1) N C for equal blocks, eq. 7."""
        return (self.leaves if leaves is None else leaves) * sum(block_costs)
