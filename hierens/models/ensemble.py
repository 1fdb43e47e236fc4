"""The hierarchical neural ensemble: a tree of branches whose leaves are the networks of an ensemble."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hierens.branches.checking import self_check
from hierens.branches.level import Activations, AnyLevel, Executor, Level, copies
from hierens.core.adaptive import Adaptive, Step, classifier_maker, is_empty, rows, statistics_once
from hierens.core.equilibrium import scale_gradient, scaled
from hierens.core.modes import evaluating, ordinary_tensors
from hierens.core.nesting import Nesting
from hierens.core.tree import Tree, nested_sizes
from hierens.cutting.cut import CutError, Cutting, cut, example_input
from hierens.evaluation.profiling import branch_macs
from hierens.models.symmetry import break_symmetry, symmetric

if TYPE_CHECKING:
    from hierens.branches.fusing import FusedEnsemble
    from hierens.branches.tuning import Tuning
    from hierens.models.ordering import Reordering

_OWN = re.compile(r"^(levels\.\d+|head|classifier)\.\d+\.")  # before a backbone's own name of a parameter
_CHECK_SIZES = (32, 64, 128)  # pixels: the self-check needs no more of an image than keeps every layer at work


class HierarchicalEnsemble(Adaptive):
    """A tree of branches (Ruiz & Verbeek, arXiv 2003.01474): every leaf is a network, any first few can be run.

    Made by `hierensify`. To timm's tools it is a timm model: data configuration, optimiser factories, EMA, classifier
    resets and feature extraction work on it as on its backbone.

    Attributes:
        tree: the arithmetic of levels, widths and leaves.
        levels: the B + 1 levels; level l holds the copies of block l.
        head: per leaf, from the features to the classifier.
        classifier: per leaf, the last linear layer.
        num_classes: number of classes.
        in_chans: image channels.
        pretrained_cfg: timm's description of the model and its preprocessing.
        classifier_names: of the last linear layer (two for a distilled backbone), as the backbone has them.
        gradient_equilibrium: whether every branch gets the mean, not the sum, of the gradients that the leaves below it
            send; off by default. See `hierens.core.equilibrium`.
    """

    architecture = "hne"

    def __init__(self, backbone: nn.Module, cutting: Cutting, tree: Tree, init: Sequence[nn.Module] = ()) -> None:
        """Put together a tree.

        Args:
            backbone: the network that was cut: its weights go to every branch unless `init` is given.
            cutting: its pieces; the ensemble takes them over.
            tree: one level per block.
            init: a network per leaf of the full tree to draw the branches' weights from.
        """
        super().__init__()
        self.tree = tree
        leaves, last = tree.leaves, tree.levels - 1
        self.levels = nn.ModuleList(
            Level(copies(block, [self._drawn(block, level, branch, init) for branch in range(tree.width(level))]))
            for level, block in enumerate(cutting.blocks)
        )
        self.head, self.classifier = (
            Level(copies(piece, [self._drawn(piece, last, leaf, init) for leaf in range(leaves)]))
            for piece in (cutting.head, cutting.classifier)
        )
        self._describe(backbone, cutting, "0.", branching=list(tree.branching), leaves=leaves)
        names = tuple(f"classifier.{leaf}.{name}" for leaf in range(leaves) for name in cutting.classifier_names)
        self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else names
        self.train(backbone.training)

    def _drawn(self, block: nn.Module, level: int, branch: int, init: Sequence[nn.Module]) -> dict[str, Tensor]:
        """The first weights of a branch: the backbone's own, or those of the first network that runs through it."""
        own = block.state_dict()
        if init:
            fresh = init[branch * self.tree.span(level)].state_dict()
            own = {name: fresh.get(name, tensor) for name, tensor in own.items()}
        return own

    @property
    def nesting(self) -> Nesting:
        """Depth b is the mean of the first 2^b leaves (eq. 5)."""
        return Nesting(nested_sizes(self.tree.leaves))

    # --- the path of a batch ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Mean logits of the first networks; only their sub-tree is run (eq. 5).

        Args:
            x: images (N, C, H, W).
            depth: run the first 2^depth networks.
            leaves: or this many; all by default.
            reduce: False returns each network's logits, what the objectives take.

        Returns:
            (N, classes), or (N, leaves, classes) if not `reduce`.

        Raises:
            ValueError: depth or leaves out of range, or images of another shape than the model takes.
        """
        n = self.leaves_at(depth, leaves)
        x = self._prepared(x)
        if is_empty(x):
            return self._no_logits(x, n, reduce)
        return self._logits(self._features(x, n), reduce)

    def climb(self, x: Tensor, leaves: int, exits: int = 0) -> Iterator[Activations]:
        """What each level hands on to the next, for the first leaves; a level is run when it is asked for.

        Args:
            x: images (N, C, H, W), as `_prepared` returns them.
            leaves: how many networks will answer; none, if only the first branch of some levels is wanted.
            exits: how many of those first branches answer by an exit, for gradient equilibrium.
        """
        activations = Activations([x])
        for index, level in enumerate(self.levels):
            parents = [self.tree.parent(index, branch) for branch in range(self.tree.width(index, max(leaves, 1)))]
            if self.gradient_equilibrium and index > 0:
                activations, parents = self._evened(index, activations, parents, (leaves, exits))
            activations = self._run(level, activations, parents)
            yield activations

    def _evened(
        self, index: int, above: Activations, parents: list[int], answering: tuple[int, int]
    ) -> tuple[Activations, list[int]]:
        """What a level reads, with gradients scaled so that every branch gets the mean over the answers behind it."""
        of_parents, of_own = (self.answers_behind(level, *answering) for level in (index - 1, index))
        shares = [own / of_parents[parent] for own, parent in zip(of_own, parents, strict=True)]
        if set(shares) == {1.0}:
            return above, parents
        if len(set(shares)) == 1:
            return above.mapped(partial(scale_gradient, factor=shares[0])), parents
        values = above.listed()
        own = [scaled(values[parent], share) for parent, share in zip(parents, shares, strict=True)]
        return Activations(own), list(range(len(own)))

    def answers_behind(self, index: int, leaves: int, exits: int = 0) -> list[int]:
        """How many answers stand behind each branch of a level: networks, and exits on the way to the first of them."""
        span = self.tree.span(index)
        counts = [min(leaves - branch * span, span) for branch in range(self.tree.width(index, max(leaves, 1)))]
        counts[0] += max(exits - index, 0)
        return counts

    def _features(self, x: Tensor, leaves: int) -> Activations:
        for activations in self.climb(x, leaves):
            features = activations  # of the last level: those before are let go
        return features

    def leaf_logits(self, features: Activations) -> Tensor:
        """From what the last level hands on to the logits of each leaf, (N, leaves, classes)."""
        logits: Tensor = self._run(self.classifier, self._run(self.head, features)).stacked()
        return logits

    def _logits(self, features: Activations, reduce: bool) -> Tensor:
        logits = self.leaf_logits(features)
        return logits.mean(1) if reduce else logits

    def _run(self, level: nn.Module, x: Activations, parents: Sequence[int] | None = None) -> Activations:
        if self.grad_checkpointing and torch.is_grad_enabled():
            contexts = statistics_once(level)
            return checkpoint(level, x, parents, use_reentrant=False, context_fn=contexts)
        return level(x, parents)

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions that sharpen leaf by leaf: a depth-first walk that computes every activation once.

        Images that are done can leave on the way: `walk.send(kept)` goes on with those of the last step's rows that are
        named, indices (K,) in ascending order, and returns the next step, of K images.

        Args:
            x: images (N, C, H, W).

        Yields:
            After each leaf the mean logits so far, what `forward(x, leaves=step.leaves)` returns.
        """
        x = self._prepared(x)
        return self.walk([x], tuple(x.shape[1:])) if len(x) else self._walk_of_none(x)

    @torch.no_grad()
    def walk(self, path: list[Any], size: tuple[int, ...]) -> Generator[Step, Tensor | None, None]:
        """`anytime` from wherever a walk along the first branches has come to.

        Args:
            path: the images, and what each of the first levels handed on, as far as that is known.
            size: of an image, (C, H, W).
        """
        macs, known = self.branch_macs(size), len(path) - 1
        path = path + [None] * (self.tree.levels - known)
        total, spent = torch.zeros(()), sum(macs[:known])
        for leaf in range(self.tree.leaves):
            for index in range(self.tree.first_new_level(leaf) if leaf else known, self.tree.levels):
                path[index + 1] = self.level(index).run_branch(leaf // self.tree.span(index), path[index])
                spent += macs[index]
            logits = self.classifier.run_branch(leaf, self.head.run_branch(leaf, path[-1]))
            total = logits if leaf == 0 else total + logits
            kept = yield Step(leaf + 1, total / (leaf + 1), spent, logits)
            if kept is not None:
                count = len(total)
                path, total = [rows(value, kept, count) for value in path], total[kept]

    def level(self, index: int) -> AnyLevel:
        """A level of the tree."""
        level = self.levels[index]
        assert isinstance(level, AnyLevel)
        return level

    def all_levels(self) -> list[AnyLevel]:
        """The levels of the tree, then the head and the classifier, which have a copy per leaf."""
        return [*(self.level(i) for i in range(self.tree.levels)), self.head, self.classifier]

    def _plain_levels(self) -> list[Level]:
        """All levels of a model that is not fused."""
        return [level for level in self.all_levels() if isinstance(level, Level)]

    # --- smaller trees, other weights -------------------------------------------------------------------------------

    @ordinary_tensors
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> HierarchicalEnsemble:
        """A model of its own with only the sub-tree of a depth (or of the first `leaves` networks).

        At depth 0 it is an ordinary network: the backbone's layers with the first leaf's weights.
        """
        tree = self.tree.prefix(self.tree.leaves_at(depth, leaves))
        levels = [self.level(i).narrowed(w) for i, w in enumerate(tree.widths())]
        return self.with_levels(tree, levels, self.head.narrowed(tree.leaves), self.classifier.narrowed(tree.leaves))

    def drop_leaves(self, count: int) -> HierarchicalEnsemble:
        """A model of its own without the last `count` leaves: `at_depth(leaves=...)`, counted from the end.

        Raises:
            ValueError: fewer than none would be dropped, or no leaf would be left.
        """
        if not 0 <= count < self.tree.leaves:
            raise ValueError(f"of {self.tree.leaves} leaves from 0 to {self.tree.leaves - 1} can go, got {count}.")
        return self.at_depth(leaves=self.tree.leaves - count)

    def grow(self) -> HierarchicalEnsemble:
        """A model of its own with one more level, exact at first: see `hierens.models.growing.grow`."""
        from hierens.models.growing import grow

        return grow(self)

    def fuse(self) -> FusedEnsemble:
        """A copy for inference, faster and equal up to rounding: see `hierens.branches.fusing.fuse`."""
        from hierens.branches.fusing import fuse

        return fuse(self)

    def tune(
        self,
        example: Tensor,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] | None = None,
        file: str | Path | None = None,
    ) -> Tuning:
        """Measure how to run each level on this machine, and do so from now on: see `hierens.branches.tuning.tune`."""
        from hierens.branches.tuning import tune

        return tune(self, example, depths, batch_sizes, file)

    def reorder(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Reordering:
        """Permute siblings in place so that small depths answer best: see `hierens.models.ordering.reorder`."""
        from hierens.models.ordering import reorder

        return reorder(self, loader)

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

    def break_symmetry(self, noise: float = 0.01, seed: int = 0) -> None:
        """Tell copied siblings apart: training would otherwise give them the same gradients for ever.

        Every branch that equals an earlier one of its level gets Gaussian noise of `noise` times the standard
        deviation of each of its weights; biases, norms and buffers are left. So after `init="copy"` depth 0 stays
        exactly the network that was copied, and after `grow` every first child stays what its parent was.
        """
        break_symmetry(self._plain_levels(), noise, seed)

    @property
    def symmetric(self) -> bool:
        """Whether any two leaves have the same weights all along their paths, as after `init="copy"` or `grow`."""
        return symmetric(self.tree, self._plain_levels())

    @property
    def looped(self) -> dict[str, str]:
        """The levels that have no grouped form, by index (the head and the classifier come last), and why."""
        reasons = {str(i): level.looped_because for i, level in enumerate(self.all_levels())}
        return {index: because for index, because in reasons.items() if because}

    def set_executor(self, executor: Executor) -> None:
        """How levels are run: `looped`, `grouped` where a block can be, or `auto`, by device and batch size.

        Raises:
            ValueError: another name.
        """
        if executor not in ("auto", "looped", "grouped"):
            raise ValueError(f"executor must be 'auto', 'looped' or 'grouped', got {executor!r}.")
        for level in self.all_levels():
            level.executor = executor

    # --- cost -------------------------------------------------------------------------------------------------------

    def branch_macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """MACs of one branch of each level for one image (C, H, W); a leaf's head counts to the last level."""
        return self._counted(size, self._count_branches)

    def _count_branches(self, size: tuple[int, ...]) -> tuple[int, ...]:
        *blocks, head, classifier = branch_macs(self.all_levels(), size)
        return (*blocks[:-1], blocks[-1] + head + classifier)

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first leaves (all by default) for one image (C, H, W)."""
        return int(self.tree.cost(self.branch_macs(size), leaves))

    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters that the sub-tree of each depth reads."""
        own = [sum(p.numel() for p in level.parameters()) // level.branches for level in self.all_levels()]
        *levels, head, classifier = own
        sizes = nested_sizes(self.tree.leaves)
        return tuple(int(self.tree.cost(levels, n)) + n * (head + classifier) for n in sizes)

    # --- a timm model to timm's tools -------------------------------------------------------------------------------

    def forward_features(self, x: Tensor, depth: int | None = None, leaves: int | None = None) -> Tensor:
        """Each leaf's features before pooling: the backbone's `forward_features`, stacked to (N, leaves, ...)."""
        return self._features(self._prepared(x), self.tree.leaves_at(depth, leaves)).stacked()

    def forward_head(self, x: Tensor, pre_logits: bool = False, reduce: bool = True) -> Tensor:
        """From `forward_features`'s result to mean logits, or with `pre_logits` to mean pooled features."""
        features = Activations.unstacked(x)
        if pre_logits:
            pooled = self._run(self.head, features).stacked()
            return pooled.mean(1) if reduce else pooled
        return self._logits(features, reduce)

    def get_classifier(self) -> Any:
        """The last linear layers, one per leaf, in a ModuleList; a tuple of such lists for a distilled backbone."""
        lists = tuple(
            nn.ModuleList(leaf.get_submodule(name) for leaf in self._leaves()) for name in self.classifier_names
        )
        return lists[0] if len(lists) == 1 else lists

    def _leaves(self) -> list[nn.Module]:
        """Each leaf's own classifier, as the backbone has it."""
        if not isinstance(self.classifier, Level):
            raise ValueError("a fused model's classifiers are packed: ask the model that it was made from.")
        return list(self.classifier)

    @ordinary_tensors
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers, drawn independently for every leaf; 0 classes leave the pooled features.

        Raises:
            ValueError: a change of pooling, or a classifier other than a linear layer.
        """
        if global_pool is not None:
            raise ValueError("the pooling is part of the tree: set global_pool when making the backbone.")
        for name in self.classifier_names:
            old = self._leaves()[0].get_submodule(name)
            if num_classes == 0:
                fresh: list[nn.Module] = [nn.Identity() for _ in range(self.tree.leaves)]
            else:
                like = next(self.parameters())
                make = classifier_maker(old, self.head_hidden_size)
                fresh = [make(num_classes).to(like.device, like.dtype) for _ in range(self.tree.leaves)]
            self.classifier.replace(name, fresh)
        self._count_classes(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants spared from weight decay."""
        return {name for name, _ in self.named_parameters() if _OWN.sub("", name) in self._no_weight_decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups, for layer-wise learning rates: a group per level, the classifier last."""
        return {"stem": r"^levels\.0\.", "blocks": r"^levels\.(\d+)\."}

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What the entry point `hne` needs to make the model again."""
        return {**super().arguments(), "looped": self.looped}

    def backbone_parts(self) -> Iterator[nn.Module]:
        """The branches of all levels."""
        return (branch for level in self.all_levels() if isinstance(level, Level) for branch in level)


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
    tree = planned(blocks, at, branching, leaves, init)
    return grown_from(backbone, cut(backbone, tree.levels, at), tree, init, seed, looped)


def planned(
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


def grown_from(
    backbone: nn.Module, cutting: Cutting, tree: Tree, init: str, seed: int | None, looped: Mapping[str, str] | None
) -> HierarchicalEnsemble:
    """The ensemble of a backbone that was cut, which takes the pieces over; the rest is as for `hierensify`."""
    drawn = _fresh_networks(backbone, tree, seed) if init == "reinit" else []
    reasons = reasons_to_loop(cutting, backbone) if looped is None else looped
    ensemble = HierarchicalEnsemble(backbone, cutting, tree, drawn)
    for index, level in enumerate(ensemble.all_levels()):
        if because := reasons.get(str(index)):
            level.loop(because)
    ensemble.train(ensemble.training)  # which finds the grouped forms
    return ensemble


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


def reasons_to_loop(cutting: Cutting, backbone: nn.Module) -> dict[str, str]:
    """The pieces whose grouped form may not be used, by index, and why."""
    pieces = (*cutting.blocks, cutting.head, cutting.classifier)
    value: Any = _small_example(backbone)
    examples = []
    for piece in pieces:
        examples.append(value)
        with torch.no_grad(), evaluating(piece):
            value = piece(*value) if isinstance(value, tuple) else piece(value)
    found = {str(i): self_check(piece, x) for i, (piece, x) in enumerate(zip(pieces, examples, strict=True))}
    return {index: because for index, because in found.items() if because}


def _small_example(backbone: nn.Module) -> Tensor:
    """An image of few pixels, or of the full size if the backbone insists on that."""
    full = example_input(backbone)
    for size in _CHECK_SIZES:
        small = full[..., :size, :size]
        with contextlib.suppress(Exception), torch.no_grad(), evaluating(backbone):
            backbone(small)
            return small
    return full


__all__ = ["CutError", "HierarchicalEnsemble", "hierensify"]
