"""Sorts siblings in the order that is best for small depths. This does not change the cost.

Branches change places with their siblings, together with their sub-trees. The prediction of all leaves is therefore
unchanged, while the first leaves are those with the best predictions on given data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.branches.level import Level
from hierens.core.labels import check_classes
from hierens.core.modes import evaluating
from hierens.core.tree import Tree, nested_sizes
from hierens.evaluation.profiling import table
from hierens.models.level_tree import LevelTree


@dataclass(frozen=True)
class Reordering:
    """The effect of a new order of siblings on the data with which it was chosen; prints as a table.

    Attributes:
        order: the former index of each leaf.
        cross_entropy_before: of each depth, in nats, mean over images.
        cross_entropy_after: in the new order.
        accuracy_before: of each depth, in percent.
        accuracy_after: in the new order.
    """

    order: tuple[int, ...]
    cross_entropy_before: tuple[float, ...]
    cross_entropy_after: tuple[float, ...]
    accuracy_before: tuple[float, ...]
    accuracy_after: tuple[float, ...]

    def __str__(self) -> str:
        """A plain table, one line per depth."""
        columns = zip(
            self.cross_entropy_before, self.cross_entropy_after, self.accuracy_before, self.accuracy_after, strict=True
        )
        rows = [
            (f"{depth}", f"{ce:.4f}", f"{ce_after:.4f}", f"{accuracy:.2f}", f"{accuracy_after:.2f}")
            for depth, (ce, ce_after, accuracy, accuracy_after) in enumerate(columns)
        ]
        return table(("depth", "cross-entropy", "after", "accuracy (%)", "after"), rows)


def reorder(model: LevelTree, loader: Iterable[tuple[Tensor, Tensor]]) -> Reordering:
    """Permute siblings in place so that the predictions of small depths are best on validation data.

    All leaves are evaluated once. For each possible first leaf, an order is built greedily: the next leaf is the one,
    of those that the tree allows, with which the leaves so far have the lowest cross-entropy. Of these orders and the
    current one, the order with the lowest sum of cross-entropies over the depths below the full one is chosen; if there
    are several, the one with the lowest sum over all prefixes.

    In a tree with dropped leaves, a branch that lost leaves remains the last of its siblings. The state of an optimiser
    is not permuted: reorder after training. Do not use the data on which the accuracy is reported.

    Args:
        model: its weights and buffers are permuted; training modes are kept.
        loader: batches of images (N, C, H, W) and class indices (N,). The logits of all leaves for all images are kept
            in memory, 4 bytes for each image, leaf and class.

    Returns:
        Cross-entropy and accuracy of every depth before and after.

    Raises:
        ValueError: an empty loader, targets that are not class indices, logits that are not finite, or no classifier.
    """
    check_classes(model, "reordering")
    logits, targets = _evaluated(model, loader)
    scores = _Scores(logits, targets)
    tree = model.tree
    current = tuple(range(tree.leaves))
    orders = [current, *(_completed(tree, scores, first) for first in _next_leaves(tree, []))]
    depths = nested_sizes(tree.leaves)[:-1]

    def merit(order: tuple[int, ...]) -> tuple[float, float]:
        prefixes = [scores.cross_entropy(order[:n]) for n in range(1, tree.leaves)]
        return sum(prefixes[n - 1] for n in depths), sum(prefixes)

    best = min(orders, key=merit)
    if best != current:
        _permute(model, best)
    return Reordering(
        best,
        *(tuple(scores.cross_entropy(order[:n]) for n in nested_sizes(tree.leaves)) for order in (current, best)),
        *(tuple(scores.accuracy(order[:n]) for n in nested_sizes(tree.leaves)) for order in (current, best)),
    )


def _evaluated(model: LevelTree, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Leaf logits (M, leaves, classes) in float32 and targets (M,) of a whole loader, on the CPU."""
    parameter = next(model.parameters())
    logits, targets = [], []
    with torch.no_grad(), evaluating(model):
        for images, target in loader:
            _check_target(target, len(images), model.num_classes)
            logits.append(model(images.to(parameter), reduce=False).float().cpu())
            targets.append(target.long().cpu())
    if not sum(len(target) for target in targets):
        raise ValueError("the loader gave no images: reordering needs at least one batch.")
    joined = torch.cat(logits)
    if not joined.isfinite().all():
        raise ValueError("the model's logits are not finite for these images: check its weights and the images.")
    return joined, torch.cat(targets)


def _check_target(target: Tensor, images: int, classes: int) -> None:
    if not isinstance(target, Tensor) or target.shape != (images,) or target.is_floating_point():
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        raise ValueError(f"targets must be class indices ({images},), got {got}.")
    if images and not 0 <= int(target.min()) <= int(target.max()) < classes:
        span = f"{int(target.min())} to {int(target.max())}"
        raise ValueError(f"targets must be class indices from 0 to {classes - 1}, got {span}.")


class _Scores:
    """Cross-entropy and accuracy of the mean logits of sets of leaves; each set is computed once."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.logits, self.targets = logits, targets
        self.known: dict[frozenset[int], tuple[float, float]] = {}

    def cross_entropy(self, leaves: Sequence[int]) -> float:
        return self._of(leaves)[0]

    def accuracy(self, leaves: Sequence[int]) -> float:
        return self._of(leaves)[1]

    def _of(self, leaves: Sequence[int]) -> tuple[float, float]:
        chosen = frozenset(leaves)
        if chosen not in self.known:
            mean = self.logits[:, sorted(chosen)].mean(1)
            accuracy = (mean.argmax(-1) == self.targets).double().mean()
            self.known[chosen] = float(F.cross_entropy(mean, self.targets)), 100 * float(accuracy)
        return self.known[chosen]


def _completed(tree: Tree, scores: _Scores, first: int) -> tuple[int, ...]:
    """An order of all leaves with a given first one; every further leaf is the best of those that may follow."""
    order = [first]
    while len(order) < tree.leaves:
        order.append(min(_next_leaves(tree, order), key=lambda leaf: (scores.cross_entropy([*order, leaf]), leaf)))
    return tuple(order)


def _next_leaves(tree: Tree, order: Sequence[int]) -> list[int]:
    """The leaves that may follow: below the deepest branch that is partly visited, in a sub-tree not yet visited.

    A sub-tree with dropped leaves can only be the last one, because widths count branches from the first.
    """
    visited = set(order)

    def below(level: int, branch: int) -> list[int]:
        span = tree.span(level)
        return list(range(branch * span, min((branch + 1) * span, tree.leaves)))

    def candidates(level: int, branches: Sequence[int]) -> list[int]:
        # The branches are siblings, and none of their ancestors is completely visited.
        partial = [b for b in branches if visited & set(below(level, b)) and not set(below(level, b)) <= visited]
        if partial:
            return candidates(level + 1, children(level, partial[0]))
        fresh = [b for b in branches if not visited & set(below(level, b))]
        whole = [b for b in fresh if len(below(level, b)) == tree.span(level)]
        chosen = whole or fresh
        if level == tree.levels - 1:
            return chosen
        return [leaf for b in chosen for leaf in candidates(level + 1, children(level, b))]

    def children(level: int, branch: int) -> list[int]:
        factor = tree.branching[level + 1]
        return list(range(branch * factor, min((branch + 1) * factor, tree.width(level + 1))))

    return candidates(0, range(tree.width(0)))


def _permute(model: LevelTree, order: Sequence[int]) -> None:
    """Permute the branches of every level, head and classifier according to an order of the leaves."""
    tree = model.tree
    for index, level in enumerate(model.all_levels()):
        assert isinstance(level, Level)
        span = tree.span(index) if index < tree.levels else 1
        level.reorder([leaf // span for leaf in order[::span]])
