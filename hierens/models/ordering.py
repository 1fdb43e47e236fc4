"""Siblings in the best order: which leaves come first decides what the small depths answer, and costs nothing.

The tree stays the same tree: branches change places with their siblings, whole sub-trees at a time, so all leaves
together answer as before while the first few are those that answer best on given data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hierens.branches.level import Level
from hierens.core.modes import evaluating
from hierens.core.tree import Tree, nested_sizes
from hierens.evaluation.profiling import table
from hierens.models.level_tree import LevelTree


@dataclass(frozen=True)
class Reordering:
    """What a new order of siblings changed, on the data it was chosen with; printed, it is a table.

    Attributes:
        order: the leaf that stands at each place now, by its place before.
        cross_entropy_before: of each depth, in nats, mean over images.
        cross_entropy_after: the same in the new order.
        accuracy_before: of each depth, in percent.
        accuracy_after: the same in the new order.
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
    """Permute siblings in place so that small depths answer best on validation data.

    All leaves are evaluated once. From each leaf as the first, an order is completed one leaf at a time, always by the
    leaf that gives the prefix so far the lowest cross-entropy among those that the tree lets come next. Of these
    orders, and the present one, that with the lowest sum of cross-entropies over the depths below the full one is
    taken; if there are several, the one with the lowest sum over all prefixes.

    In a tree that was trimmed, a branch that lost leaves stays the last among its siblings. The state of an optimiser
    is not permuted: reorder after training. Choose on data that the accuracy is not reported on.

    Args:
        model: its weights and buffers are permuted; training modes are kept.
        loader: batches of images (N, C, H, W) and class indices (N,); all leaves' logits of all of them are kept in
            memory, 4 bytes for each image, leaf and class.

    Returns:
        Cross-entropy and accuracy of every depth before and after.

    Raises:
        ValueError: an empty loader, targets that are no class indices, logits that are not finite, or no classifier.
    """
    if model.num_classes < 1:
        raise ValueError("the classifier was removed: without classes no order of the leaves is better than another.")
    logits, targets = _evaluated(model, loader)
    scores = _Scores(logits, targets)
    tree = model.tree
    present = tuple(range(tree.leaves))
    orders = [present, *(_completed(tree, scores, first) for first in _next_leaves(tree, []))]
    depths = nested_sizes(tree.leaves)[:-1]

    def merit(order: tuple[int, ...]) -> tuple[float, float]:
        prefixes = [scores.cross_entropy(order[:n]) for n in range(1, tree.leaves)]
        return sum(prefixes[n - 1] for n in depths), sum(prefixes)

    best = min(orders, key=merit)
    if best != present:
        _permute(model, best)
    return Reordering(
        best,
        *(tuple(scores.cross_entropy(order[:n]) for n in nested_sizes(tree.leaves)) for order in (present, best)),
        *(tuple(scores.accuracy(order[:n]) for n in nested_sizes(tree.leaves)) for order in (present, best)),
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
        raise ValueError("the loader gave no images: the order of the leaves is chosen on at least one batch.")
    joined = torch.cat(logits)
    if not joined.isfinite().all():
        raise ValueError("the model's logits are not finite on these images: no order can be chosen.")
    return joined, torch.cat(targets)


def _check_target(target: Tensor, images: int, classes: int) -> None:
    if not isinstance(target, Tensor) or target.shape != (images,) or target.is_floating_point():
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        raise ValueError(f"targets must be class indices ({images},), got {got}.")
    if images and not 0 <= int(target.min()) <= int(target.max()) < classes:
        span = f"{int(target.min())} to {int(target.max())}"
        raise ValueError(f"targets must be class indices from 0 to {classes - 1}, got {span}.")


class _Scores:
    """Cross-entropy and accuracy of the mean of a set of leaves, each set computed once."""

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
            right = (mean.argmax(-1) == self.targets).double().mean()
            self.known[chosen] = float(F.cross_entropy(mean, self.targets)), 100 * float(right)
        return self.known[chosen]


def _completed(tree: Tree, scores: _Scores, first: int) -> tuple[int, ...]:
    """An order of all leaves: the first is given, every further one is the best of those that may come next."""
    order = [first]
    while len(order) < tree.leaves:
        order.append(min(_next_leaves(tree, order), key=lambda leaf: (scores.cross_entropy([*order, leaf]), leaf)))
    return tuple(order)


def _next_leaves(tree: Tree, order: Sequence[int]) -> list[int]:
    """The leaves that may follow: below the deepest branch that is begun and not finished, in a sub-tree not begun.

    A sub-tree that lost leaves to trimming can only stand last, for widths count branches from the first.
    """
    visited = set(order)

    def below(level: int, branch: int) -> list[int]:
        span = tree.span(level)
        return list(range(branch * span, min((branch + 1) * span, tree.leaves)))

    def candidates(level: int, branches: Sequence[int]) -> list[int]:
        # Siblings of one level that all lie under a branch that is being walked.
        begun = [b for b in branches if visited & set(below(level, b)) and not set(below(level, b)) <= visited]
        if begun:
            return candidates(level + 1, children(level, begun[0]))
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
    """Put the branches of every level, and of head and classifier, where an order of the leaves wants them."""
    tree = model.tree
    for index, level in enumerate(model.all_levels()):
        assert isinstance(level, Level)
        span = tree.span(index) if index < tree.levels else 1
        level.reorder([leaf // span for leaf in order[::span]])
