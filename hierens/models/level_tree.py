"""A model that is a tree of levels: what growing, reordering and tuning take, and `HierarchicalEnsemble` is."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from hierens.branches.level import AnyLevel
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

    tree: Tree
    head: Any
    classifier: Any
    classifier_names: tuple[str, ...]

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
        kind: type[Any] | None = None,
    ) -> Any:
        """A model of its own (of this class, or of `kind`) that is described as this one but has other levels."""
        other: Any = object.__new__(kind or type(self))
        nn.Module.__init__(other)
        kept = {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k not in nn.Module().__dict__}
        other.__dict__.update(kept, tree=tree, training=self.training, _macs={})
        other.default_cfg = other.pretrained_cfg
        other._model_args.update(branching=list(tree.branching), leaves=tree.leaves)
        other.levels, other.head, other.classifier = nn.ModuleList(levels), head, classifier
        return other
