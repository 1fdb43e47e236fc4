"""Builds a tree of levels from a backbone that was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
from timm.models import get_model_args
from torch import Tensor, nn

from hierens.branches.level import Level, sharing_tensors
from hierens.branches.light import called_layers, fresh_factors, lighten
from hierens.branches.self_check import reasons_to_loop
from hierens.core.members import Kind, member_kinds
from hierens.core.model_info import ModelInfo
from hierens.core.modes import seeded
from hierens.core.tree import Tree
from hierens.cutting.cut import Cutting
from hierens.models.adaptive import Adaptive
from hierens.models.ensemble import HierarchicalEnsemble


def build_tree(
    blocks: int, at: Sequence[str] | None, branching: Sequence[int] | None, leaves: int | None, init: str
) -> Tree:
    """The tree for the arguments of `hierensify`.

    Raises:
        ValueError: arguments out of range, or that contradict each other.
    """
    if init not in ("copy", "reinit"):
        raise ValueError(f"init must be 'copy' or 'reinit', got {init!r}.")
    if at is not None:
        blocks = len(at) + 1
    elif branching is not None:
        blocks = len(branching)
    tree = Tree.binary(blocks) if branching is None else Tree(tuple(branching))
    if tree.levels != blocks:
        raise ValueError(f"branching has {tree.levels} levels, but `at` gives {blocks} blocks.")
    return tree if leaves is None else tree.prefix(leaves)


class Sharing(NamedTuple):
    """What the branches of each level share.

    Attributes:
        members: as given to `hierensify`.
        rank: likewise.
        kinds: of each level, the head and the classifier.
    """

    members: Kind | Sequence[Kind]
    rank: int | None
    kinds: tuple[Kind, ...]

    @classmethod
    def checked(cls, members: Kind | Sequence[Kind], rank: int | None, tree: Tree) -> Sharing:
        """The sharing for the arguments of `hierensify`.

        Raises:
            ValueError: arguments out of range, or that do not fit the tree.
        """
        return cls(members, rank, member_kinds(members, rank, tree.levels))

    @property
    def arguments(self) -> dict[str, Any]:
        """What a saved model states; nothing if all levels are full."""
        if set(self.kinds) == {"full"}:
            return {}
        members = self.members if isinstance(self.members, str) else list(self.members)
        return {"members": members, **({} if self.rank is None else {"rank": self.rank})}


def build_ensemble(
    backbone: nn.Module,
    cutting: Cutting,
    tree: Tree,
    sharing: Sharing,
    init: str,
    seed: int | None,
    looped: Mapping[str, str] | None,
) -> HierarchicalEnsemble:
    """The ensemble of a backbone that was cut. It reuses the blocks. Other arguments are as for `hierensify`."""
    networks = _fresh_networks(backbone, tree, seed) if init == "reinit" else []
    branches = [*tree.widths(), tree.leaves, tree.leaves]
    info = ModelInfo.of_backbone(backbone, cutting.at, cutting.classifier_names, "levels.0.0.")
    info.stages = cutting.stages
    info.model_args.update(sharing.arguments)
    parts = _light_parts(cutting, branches, sharing, info.pretrained_cfg["input_size"])
    reasons = reasons_to_loop(parts, backbone, branches) if looped is None else looped
    spans = (*(tree.span(level) for level in range(tree.levels)), 1, 1)
    with seeded(seed):
        *levels, head, classifier = (
            _level(part, range(0, tree.leaves, span), networks) for part, span in zip(parts, spans, strict=True)
        )
    ensemble = HierarchicalEnsemble(tree, levels, head, classifier, info)
    copy_buffers(backbone, ensemble)
    for index, level in enumerate(ensemble.all_levels()):
        if reason := reasons.get(str(index)):
            level.loop(reason)
    ensemble.train(backbone.training)  # also prepares the grouped forms
    return ensemble


def _light_parts(cutting: Cutting, branches: Sequence[int], sharing: Sharing, size: Sequence[int]) -> list[nn.Module]:
    """The blocks, the head and the classifier, with light layers where branches are to share weights.

    Args:
        cutting: the parts.
        branches: number of copies of each.
        sharing: their kinds.
        size: of an image, (C, H, W).
    """
    parts = list[nn.Module](cutting.parts)
    chosen = [index for index, kind in enumerate(sharing.kinds) if kind != "full" and branches[index] > 1]
    called = called_layers(parts, size) if chosen else []
    for index in chosen:
        parts[index] = lighten(sharing_tensors(parts[index]), sharing.kinds[index], sharing.rank, called[index])
    return parts


def _level(block: nn.Module, leaves: Sequence[int], networks: Sequence[nn.Module]) -> Level:
    """A branch for the first leaf below each."""
    return Level.of_copies(block, len(leaves), lambda branch: _weights(block, leaves[branch], networks))


def _weights(block: nn.Module, leaf: int, networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Initial weights of the branch on the path to a leaf: from the network of that leaf, or from the backbone."""
    own = block.state_dict()
    if networks:
        fresh = networks[leaf].state_dict()
        own = {name: fresh.get(name, tensor) for name, tensor in own.items()}
    return own | fresh_factors(block)


def copy_buffers(backbone: nn.Module, model: Adaptive) -> None:
    """Copy buffers with values to a model on the meta device: accelerate's `init_empty_weights` leaves them to it."""
    if not any(parameter.is_meta for parameter in backbone.parameters()):
        return
    values = {name: buffer for name, buffer in backbone.named_buffers() if not buffer.is_meta}
    for part in model.backbone_parts():
        for name in [name for name, _ in part.named_buffers() if name in values]:
            owner, _, key = name.rpartition(".")
            setattr(part.get_submodule(owner), key, values[name].clone())


def _fresh_networks(backbone: nn.Module, tree: Tree, seed: int | None) -> list[nn.Module]:
    """A newly initialised backbone for every leaf."""
    architecture = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise ValueError("init='reinit' needs a backbone made by timm.create_model, and this one was not: use 'copy'.")
    args = {**get_model_args(backbone), "num_classes": backbone.num_classes}
    with seeded(seed):
        return [timm.create_model(architecture, **args) for _ in range(tree.leaves)]
