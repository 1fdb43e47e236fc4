"""From a timm model to a hierarchical neural ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from hierens.branches.check import reasons_to_loop
from hierens.branches.level import Level
from hierens.core.model_info import ModelInfo
from hierens.core.modes import ordinary_tensors
from hierens.core.tree import Tree
from hierens.cutting.cut import Cutting, cut
from hierens.models.ensemble import HierarchicalEnsemble


@ordinary_tensors
def hierensify(
    backbone: nn.Module,
    blocks: int = 4,
    *,
    init: Literal["copy", "reinit"] = "copy",
    at: Sequence[str] | None = None,
    branching: Sequence[int] | None = None,
    leaves: int | None = None,
    seed: int | None = None,
    looped: Mapping[str, str] | None = None,
) -> HierarchicalEnsemble:
    """Turn a timm model into a hierarchical neural ensemble.

    Args:
        backbone: any block-structured timm classification model; it is left as it is.
        blocks: levels of the tree, B + 1; it has 2^B leaves.
        init: `copy` gives every branch the backbone's weights, so that every depth answers as the backbone does (call
            `break_symmetry` before training; the trainer does); `reinit` draws every branch anew by the backbone's
            own initialisation.
        at: names of modules that shall begin the second and later blocks, instead of cuts into equal shares of work.
        branching: children per branch and level, `(1, 2, 2, ...)` by default; sets `blocks`.
        leaves: keep only this many leaves, from the first.
        seed: of `init="reinit"`; drawn from torch's generator by default.
        looped: levels that may not be run grouped, by index as a string, and why: what `model.looped` said of the same
            tree. By default this is found out: a block whose grouped form does not equal the looped one is looped.

    Raises:
        ValueError: a backbone that cannot be cut as asked (`CutError`), or arguments out of range.

    Examples:
        >>> import timm, torch, hierens
        >>> model = hierens.hierensify(timm.create_model("mobilenetv2_050", num_classes=10), blocks=3)
        >>> model(torch.randn(1, 3, 64, 64), depth=1).shape
        torch.Size([1, 10])
    """
    tree = build_tree(blocks, at, branching, leaves, init)
    return build_ensemble(backbone, cut(backbone, tree.levels, at), tree, init, seed, looped)


def build_tree(
    blocks: int, at: Sequence[str] | None, branching: Sequence[int] | None, leaves: int | None, init: str
) -> Tree:
    """The tree that the arguments of `hierensify` ask for.

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
        raise ValueError(f"branching has {tree.levels} levels, but `at` makes {blocks} blocks.")
    return tree if leaves is None else tree.prefix(leaves)


def build_ensemble(
    backbone: nn.Module, cutting: Cutting, tree: Tree, init: str, seed: int | None, looped: Mapping[str, str] | None
) -> HierarchicalEnsemble:
    """The ensemble of a backbone that was cut; it takes over the pieces. Other arguments are as for `hierensify`."""
    networks = _fresh_networks(backbone, tree, seed) if init == "reinit" else []
    branches = [*tree.widths(), tree.leaves, tree.leaves]
    reasons = reasons_to_loop(cutting, backbone, branches) if looped is None else looped
    *levels, head, classifier = (
        _level(block, range(0, tree.leaves, span), networks)
        for block, span in (
            *((block, tree.span(level)) for level, block in enumerate(cutting.blocks)),
            (cutting.head, 1),
            (cutting.classifier, 1),
        )
    )
    info = ModelInfo.of_backbone(backbone, cutting.at, cutting.classifier_names, "levels.0.0.")
    ensemble = HierarchicalEnsemble(tree, levels, head, classifier, info)
    for index, level in enumerate(ensemble.all_levels()):
        if reason := reasons.get(str(index)):
            level.loop(reason)
    ensemble.train(backbone.training)  # which finds the grouped forms
    return ensemble


def _level(block: nn.Module, leaves: Sequence[int], networks: Sequence[nn.Module]) -> Level:
    """A branch for the first leaf below each."""
    return Level.of_copies(block, len(leaves), lambda branch: _weights(block, leaves[branch], networks))


def _weights(block: nn.Module, leaf: int, networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The first weights of the branch on the path to a leaf: the leaf's own network's, or the backbone's."""
    own = block.state_dict()
    if networks:
        fresh = networks[leaf].state_dict()
        own = {name: fresh.get(name, tensor) for name, tensor in own.items()}
    return own


def _fresh_networks(backbone: nn.Module, tree: Tree, seed: int | None) -> list[nn.Module]:
    """A newly initialised backbone for every leaf."""
    architecture = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise ValueError("init='reinit' makes the backbone anew by timm.create_model, which did not make this one.")
    args = {**get_model_args(backbone), "num_classes": backbone.num_classes}
    networks: list[nn.Module] = []
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        networks = [timm.create_model(architecture, **args) for _ in range(tree.leaves)]
    return networks
