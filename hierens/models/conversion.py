"""The functions that convert a network: `hierensify`, `tree_with_exits` and `multi_exit`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from hierens.core import timm_info
from hierens.core.labels import check_classes
from hierens.core.members import Kind
from hierens.core.model_info import ModelInfo
from hierens.core.modes import ordinary_tensors, seeded
from hierens.core.predictions import Average
from hierens.cutting.backbones import described
from hierens.cutting.cut import CutError, cut
from hierens.models.building import Sharing, build_ensemble, build_tree, copy_buffers
from hierens.models.collaboration import new_embeddings
from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.exit_weights import ExitWeights, prior
from hierens.models.heads import BackboneExit, Exit, HeadKind, OwnExit, new_exits
from hierens.models.multi_exit import MultiExit
from hierens.models.tree_exits import TreeWithExits

__all__ = ["hierensify", "multi_exit", "tree_with_exits"]


@ordinary_tensors
def hierensify(
    backbone: nn.Module,
    blocks: int = 4,
    *,
    classifier: str | None = None,
    input_size: Sequence[int] | None = None,
    init: Literal["copy", "reinit"] = "copy",
    at: Sequence[str] | None = None,
    branching: Sequence[int] | None = None,
    leaves: int | None = None,
    members: Kind | Sequence[Kind] = "full",
    rank: int | None = None,
    seed: int | None = None,
    looped: Mapping[str, str] | None = None,
) -> HierarchicalEnsemble:
    """Convert a timm model, or another network, to a hierarchical neural ensemble.

    Args:
        backbone: any block-structured timm model, or with `classifier` and `input_size` any network from images
            (N, C, H, W) to one tensor (N, classes, ...); it is not changed. Without classifier (`num_classes=0`,
            encoders), the tree's outputs are embeddings: see `HierarchicalEnsemble.embed`.
        blocks: levels of the tree, B + 1; it has 2^B leaves.
        classifier: the name of the last layer, such as `"fc"`, of a network that is not timm's.
        input_size: the size (C, H, W) of its images.
        init: `copy` gives every branch the backbone's weights, so that the output of every depth equals the backbone's
            (call `break_symmetry` before training; the trainer does); `reinit` initialises every branch as the backbone
            initialises itself.
        at: names of the modules with which the second and later blocks begin, instead of cuts into equal shares of the
            cost.
        branching: children per branch and level, `(1, 2, 2, ...)` by default; sets `blocks`.
        leaves: keep only this many leaves, from the first.
        members: what the branches of a level share. `full`: nothing. `rank1` and `lora`: the weights of dense layers;
            each branch has its own factors, biases and norms (`hierens.branches.light`). One kind, or one per level;
            the head and the classifier have the last level's. A level with one branch is always `full`.
        rank: of the factors of `lora`.
        seed: for `init="reinit"`, and the factors of `lora`; drawn from torch's generator by default.
        looped: the reason for each level that must not be run grouped, by index as a string: `model.looped` of the same
            tree. By default it is determined by a self-check: a block is looped if its grouped outputs differ.

    Raises:
        ValueError: a backbone that cannot be cut as asked (`CutError`), or arguments out of range.

    Examples:
        >>> import timm, torch, hierens
        >>> model = hierens.hierensify(timm.create_model("mobilenetv2_050", num_classes=10), blocks=3)
        >>> model(torch.randn(1, 3, 64, 64), depth=1).shape
        torch.Size([1, 10])
    """
    backbone = described(backbone, classifier, input_size)
    tree = build_tree(blocks, at, branching, leaves, init)
    sharing = Sharing.checked(members, rank, tree)
    return build_ensemble(backbone, cut(backbone, tree.levels, at), tree, sharing, init, seed, looped)


@ordinary_tensors
def tree_with_exits(
    backbone: nn.Module,
    blocks: int = 4,
    *,
    classifier: str | None = None,
    input_size: Sequence[int] | None = None,
    head: HeadKind = "pool",
    at: Sequence[str] | None = None,
    branching: Sequence[int] | None = None,
    init: Literal["copy", "reinit"] = "copy",
    leaves: int | None = None,
    members: Kind | Sequence[Kind] = "full",
    rank: int | None = None,
    seed: int | None = None,
    looped: Mapping[str, str] | None = None,
) -> TreeWithExits:
    """Convert a timm model to a hierarchical ensemble with exits in its first network.

    Args:
        backbone: as for `hierens.hierensify`, of a network that classifies whole images.
        blocks: levels of the tree; all but the last get an exit.
        classifier: as for `hierens.hierensify`.
        input_size: likewise.
        head: kind of the exits: `pool` or `conv`, as for `hierens.multi_exit`.
        at: as for `hierens.hierensify`.
        branching: likewise.
        init: likewise.
        leaves: likewise.
        members: likewise.
        rank: likewise.
        seed: for the exits, for `init="reinit"`, and the factors of `lora`; drawn from torch's generator by default.
        looped: as for `hierens.hierensify`.

    Raises:
        ValueError: a backbone that cannot be cut as asked (`CutError`), features that a head cannot read, or arguments
            out of range.

    Examples:
        >>> import timm, torch, hierens
        >>> model = hierens.tree_with_exits(timm.create_model("resnet10t", num_classes=10), blocks=3)
        >>> model.depths, model.sizes  # two exits, then the first 1, 2 and 4 networks
        (5, (1, 2, 3, 4, 6))
    """
    backbone = _one_answer(described(backbone, classifier, input_size))
    tree = build_tree(blocks, at, branching, leaves, init)
    if tree.levels < 2:
        raise ValueError("exits are placed between blocks: a tree with exits needs blocks=2 at least.")
    check_classes(backbone, "a tree with exits")
    sharing = Sharing.checked(members, rank, tree)
    cutting = cut(backbone, tree.levels, at, single=True)
    with seeded(seed):
        exits = new_exits(head, backbone, cutting.blocks)
    return TreeWithExits(build_ensemble(backbone, cutting, tree, sharing, init, seed, looped), exits, head)


@ordinary_tensors
def multi_exit(
    backbone: nn.Module,
    exits: int | None = None,
    *,
    classifier: str | None = None,
    input_size: Sequence[int] | None = None,
    at: Sequence[str] | None = None,
    head: HeadKind = "pool",
    collaborate: bool = False,
    weights: str | Sequence[float] | None = None,
    learn_weights: bool = False,
    average: Average = "logits",
    boosted: bool = False,
    num_classes: int | None = None,
) -> MultiExit:
    """Add exits to a network. The last exit is the model's own head, so the output of the full network is unchanged.

    Args:
        backbone: as for `hierens.hierensify`, of a network that classifies whole images.
        exits: number of exits, placed after equal shares of the cost, 4 by default. A network with exits of its own,
            such as MSDNet, keeps those, and takes no number.
        classifier: as for `hierens.hierensify`.
        input_size: likewise.
        at: names of the modules before which exits are placed, instead of `exits`; one more is at the end.
        head: kind of the other exits: `pool` (global pooling and a linear layer, for any features) or `conv` (two
            convolutions before that, as in MSDNet; for feature maps).
        collaborate: each exit also reads an embedding of the logits of the exit before (IMTA).
        weights: of an ensemble of the exits so far (AEP): a name of `hierens.models.exit_weights.prior`, or one number
            per exit; by default the exits are not combined.
        learn_weights: train the weights, starting from `weights` or from uniform ones.
        average: what the weights average: `logits`, or `probabilities`, whose logarithm is then the output.
        boosted: add the logits of the exit before to those of each exit, without a gradient to them (BoostNet: Yu et
            al., arXiv 2211.16726). Classifiers of early exits start at zero, so the last is the backbone's at first.
        num_classes: for new classifiers; by default the backbone's own are kept.

    Raises:
        ValueError: a backbone that cannot be cut as asked (`CutError`), features that a head cannot read, or arguments
            out of range.

    Examples:
        >>> import timm, torch, hierens
        >>> model = hierens.multi_exit(timm.create_model("resnet10t", num_classes=10), exits=3)
        >>> model(torch.randn(1, 3, 64, 64), depth=0).shape
        torch.Size([1, 10])
    """
    if boosted and (weights is not None or learn_weights):
        raise ValueError("boosted exits are sums already, and have no weights: omit boosted, or the weights.")
    backbone = copy.deepcopy(_one_answer(described(backbone, classifier, input_size)))
    _reset_classifier(backbone, num_classes)
    check_classes(backbone, "a multi-exit network")
    at, early = _own_exits(backbone, exits, at, head)
    cutting = cut(backbone, 4 if exits is None else exits, at, single=True, counted="exits")
    _, features = timm_info.num_features(backbone)
    own = OwnExit(cutting.head, cutting.classifier, cutting.classifier_names, features)
    heads: list[Exit] = [*(early or new_exits(head, backbone, cutting.blocks)), own]
    for exit in heads[:-1] if boosted else ():
        for parameter in exit.classifier.get_submodule(exit.names[0]).parameters():
            nn.init.zeros_(parameter)
    if learn_weights and weights is None:
        weights = "uniform"
    own_weights = None if weights is None else list(prior(weights, len(heads)))
    info = ModelInfo.of_backbone(backbone, cutting.at, cutting.classifier_names, "levels.0.")
    if own_weights is None and average != "logits":
        raise ValueError(f"average={average!r} is for exits that are combined: give weights, or learn_weights=True.")
    combined = {"weights": own_weights, "learn_weights": learn_weights, "average": average, "boosted": boosted}
    info.model_args.update(head=head, collaborate=collaborate, **combined)
    info.stages = cutting.stages
    like = next(backbone.parameters())
    model = MultiExit(
        cutting.blocks,
        heads,
        info,
        embeddings=new_embeddings(heads, info.num_classes, like) if collaborate else [],
        weighting=None if own_weights is None else ExitWeights(own_weights, learn_weights, average).to(like),
        boosted=boosted,
    )
    copy_buffers(backbone, model)
    return model.train(backbone.training)


def _reset_classifier(backbone: nn.Module, num_classes: int | None) -> None:
    """Give a timm model new classifiers, if it is to have another number of classes."""
    if num_classes in (None, timm_info.num_classes(backbone)):
        return
    if timm_info.description(backbone):
        raise CutError("num_classes is for timm models: call reset_classifier of the result instead.")
    reset: Callable[[int | None], None] = backbone.reset_classifier  # type: ignore[assignment]
    reset(num_classes)


def _own_exits(
    backbone: nn.Module, exits: int | None, at: Sequence[str] | None, head: HeadKind
) -> tuple[Sequence[str] | None, list[BackboneExit]]:
    """The places and classifiers of exits that the backbone itself has; else `at`, and none."""
    find: Callable[[], Any] | None = getattr(backbone, "own_exits", None)
    if find is None:
        return at, []
    names, classifiers = find()
    if at not in (None, names) or exits not in (None, len(names) + 1) or head != "pool":
        raise ValueError(
            f"this {type(backbone).__name__} has {len(names) + 1} exits of its own: omit exits, at and head, and call "
            "keep_exits of the result for fewer."
        )
    return names, [BackboneExit(classifier) for classifier in classifiers]


def _one_answer(backbone: nn.Module) -> nn.Module:
    """The backbone, if it classifies whole images: an exit has no other output."""
    if (own := timm_info.description(backbone)) and own.dense:
        raise CutError(f"exits classify whole images, and this {type(backbone).__name__} does not: use hierensify.")
    return backbone
