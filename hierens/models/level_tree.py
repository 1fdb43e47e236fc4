"""A model that is a tree of levels: what growing, reordering and tuning take, and `HierarchicalEnsemble` is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from hierens.branches.any_level import AnyLevel
from hierens.core.model_info import ModelInfo
from hierens.core.tree import Tree
from hierens.models.adaptive import Adaptive


class LevelTree(Adaptive):
    """The levels of a tree, a head and a classifier per leaf, and the same model of other levels.

    Attributes:
        tree: the arithmetic of levels, widths and leaves.
        head: per leaf, from the features to the classifier.
        classifier: per leaf, the last linear layer.
        classifier_names: of the last linear layer (two for a distilled backbone), as the backbone has them.
    """

    def __init__(
        self, tree: Tree, levels: Sequence[AnyLevel], head: AnyLevel, classifier: AnyLevel, info: ModelInfo
    ) -> None:
        """Put together a tree.

        Args:
            tree: the arithmetic of levels, widths and leaves.
            levels: one per level, with as many branches as the tree has there.
            head: a branch per leaf, from the features to the classifier.
            classifier: a branch per leaf, the last linear layer.
            info: of the backbone or of another tree.
        """
        super().__init__(info)
        self.tree, self.levels = tree, nn.ModuleList(levels)
        self.head: Any = head
        self.classifier: Any = classifier
        self._model_args.update(branching=list(tree.branching), leaves=tree.leaves)
        names = tuple(f"classifier.{leaf}.{name}" for leaf in range(tree.leaves) for name in self.classifier_names)
        self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else names

    @abstractmethod
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> LevelTree:
        """A model of its own with only the sub-tree of a depth (or of the first `leaves` networks)."""

    def level(self, index: int) -> AnyLevel:
        """A level of the tree."""
        level = self.levels[index]
        assert isinstance(level, AnyLevel)
        return level

    def all_levels(self) -> list[AnyLevel]:
        """The levels of the tree, then the head and the classifier, which have a copy per leaf."""
        return [*(self.level(i) for i in range(self.tree.levels)), self.head, self.classifier]

    def with_levels(
        self,
        tree: Tree,
        levels: Sequence[AnyLevel],
        head: AnyLevel,
        classifier: AnyLevel,
        kind: type[LevelTree] | None = None,
    ) -> Any:
        """A model of its own (of this class, or of `kind`) with this one's record and settings and other levels."""
        other = (kind or type(self))(tree, levels, head, classifier, self.info)
        other.gradient_equilibrium, other.grad_checkpointing = self.gradient_equilibrium, self.grad_checkpointing
        other.training = self.training
        return other
