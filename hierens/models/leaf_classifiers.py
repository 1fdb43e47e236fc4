"""The classifiers of a tree: a last linear layer for each leaf, in timm's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hierens.branches.level import Level
from hierens.branches.light import lighten
from hierens.core.adaptive_base import classifier_maker, linear_names
from hierens.core.members import Kind, member_kinds
from hierens.core.modes import ordinary_tensors
from hierens.core.tree import Tree
from hierens.models.adaptive import Adaptive


class LeafClassifiers(Adaptive):
    """A network with a classifier per leaf.

    Attributes:
        tree: the arithmetic of levels, widths and leaves.
        head: per leaf, from the features to the classifier.
        classifier: per leaf, the last linear layer.
    """

    tree: Tree
    head: Any
    classifier: Any

    @property
    def member_kinds(self) -> tuple[Kind, ...]:
        """The kind of the branches of each level, of the head and of the classifier: see `hierens.core.members`."""
        return member_kinds(self._model_args.get("members", "full"), self._model_args.get("rank"), self.tree.levels)

    def get_classifier(self) -> Any:
        """The last linear layers, one per leaf, in a ModuleList; a tuple of such lists for a distilled backbone."""
        lists = tuple(
            nn.ModuleList(leaf.get_submodule(name) for leaf in self._leaves()) for name in self.classifier_names
        )
        return lists[0] if len(lists) == 1 else lists

    def _leaves(self) -> list[nn.Module]:
        """The classifier module of each leaf."""
        if not isinstance(self.classifier, Level):
            raise ValueError("a fused model's classifiers are packed: call get_classifier before fuse().")
        return list(self.classifier)

    @ordinary_tensors
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers by new ones, initialised independently per leaf; 0 classes output pooled features.

        Raises:
            ValueError: a change of pooling, or a classifier without a linear layer.
        """
        if global_pool is not None:
            raise ValueError(
                f"the pooling is part of the tree, so global_pool={global_pool!r} cannot be set: set it when creating "
                "the backbone, or call forward_features for features that are not pooled."
            )
        for name in self.classifier_names:
            old = self._leaves()[0].get_submodule(name)
            if num_classes == 0:
                fresh: list[nn.Module] = [nn.Identity() for _ in range(self.tree.leaves)]
            else:
                like = next(self.parameters())
                make = classifier_maker(old, self.head_hidden_size)
                fresh = [make(num_classes).to(like.device, like.dtype) for _ in range(self.tree.leaves)]
                for layer in fresh if self.tree.leaves > 1 else ():
                    lighten(layer, self.member_kinds[-1], self._model_args.get("rank"))
            self.classifier.replace(name, fresh)
        self._name_classifiers()
        self._count_classes(num_classes)

    def _drop_heads(self) -> None:
        self.head, self.classifier = (Level(nn.Identity() for _ in range(self.leaves)) for _ in range(2))
        self.classifier_names = ()

    def _name_classifiers(self) -> None:
        """Record for timm which layers depend on the number of classes."""
        own: Sequence[str] = self.classifier_names
        if isinstance(self.classifier, Level):  # a fused model is not saved
            own = linear_names(self.classifier[0], own)
        names = tuple(f"classifier.{leaf}.{name}" for leaf in range(self.tree.leaves) for name in own)
        self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else names
