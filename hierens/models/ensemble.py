"""The hierarchical neural ensemble: a tree of branches whose leaves are the networks of an ensemble."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hierens.branches.activations import Activations
from hierens.branches.any_level import Executor
from hierens.branches.fuse import LayersSeen, attach_activations, fused_levels, refuse, with_separate_activations
from hierens.branches.fused_layers import attached_activations_are_safe, separate_activations
from hierens.branches.fused_level import FusedLevel
from hierens.branches.level import Level
from hierens.core.adaptive import classifier_maker, statistics_once
from hierens.core.equilibrium import scale_gradient, scaled
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.core.tree import nested_sizes
from hierens.core.values import is_empty, select_samples
from hierens.evaluation.profiling import branch_macs
from hierens.models.growing import grow
from hierens.models.level_tree import LevelTree
from hierens.models.ordering import Reordering, reorder
from hierens.models.symmetry import break_symmetry, symmetric
from hierens.models.tuning import Tuning, tune

_OWN = re.compile(r"^(levels\.\d+|head|classifier)\.\d+\.")  # before a backbone's own name of a parameter


class HierarchicalEnsemble(LevelTree):
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

    @property
    def prediction_weights(self) -> PredictionWeights:
        """Depth b is the mean of the first 2^b leaves (eq. 5)."""
        return PredictionWeights(nested_sizes(self.tree.leaves))

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

    def forward_levels(self, x: Tensor, leaves: int, exits: int = 0) -> Iterator[Activations]:
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
        of_parents, of_own = (self.num_outputs_below(level, *answering) for level in (index - 1, index))
        shares = [own / of_parents[parent] for own, parent in zip(of_own, parents, strict=True)]
        if set(shares) == {1.0}:
            return above, parents
        if len(set(shares)) == 1:
            return above.mapped(partial(scale_gradient, factor=shares[0])), parents
        values = above.listed()
        own = [scaled(values[parent], share) for parent, share in zip(parents, shares, strict=True)]
        return Activations(own), list(range(len(own)))

    def num_outputs_below(self, index: int, leaves: int, exits: int = 0) -> list[int]:
        """How many answers stand behind each branch of a level: networks, and exits on the way to the first of them."""
        span = self.tree.span(index)
        counts = [min(leaves - branch * span, span) for branch in range(self.tree.width(index, max(leaves, 1)))]
        counts[0] += max(exits - index, 0)
        return counts

    def _features(self, x: Tensor, leaves: int) -> Activations:
        for activations in self.forward_levels(x, leaves):
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
                path, total = [select_samples(value, kept, count) for value in path], total[kept]

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
        levels = [self.level(i).first_branches(w) for i, w in enumerate(tree.widths())]
        head, classifier = (level.first_branches(tree.leaves) for level in (self.head, self.classifier))
        return self.with_levels(tree, levels, head, classifier)

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
        return grow(self)

    @ordinary_tensors
    def fuse(self) -> FusedEnsemble:
        """A copy for inference: faster, equal up to rounding.

        In every block with a grouped form batch norms are folded into the convolutions before them, standardised
        weights are computed once, and activations become part of the convolution's kernel. Feature maps are kept in
        channels-last order. Other blocks are left as they are.

        Returns:
            A model in evaluation mode that cannot be trained or saved.

        Raises:
            ValueError: a layer has a hook, which would be called no more.
        """
        *levels, head, classifier = fused_levels(self.all_levels())
        fused: FusedEnsemble = self.with_levels(self.tree, levels, head, classifier, FusedEnsemble)
        attach_activations(fused)
        fused.watch_layers()
        return fused.eval().requires_grad_(False)

    def fold_norms(self) -> FusedEnsemble:
        """See `fuse`."""
        return self.fuse()

    def tune(
        self,
        example: Tensor,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] | None = None,
        file: str | Path | None = None,
    ) -> Tuning:
        """Measure how to run each level on this machine, and do so from now on: see `hierens.models.tuning.tune`."""
        return tune(self, example, depths, batch_sizes, file)

    def reorder(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Reordering:
        """Permute siblings in place so that small depths answer best: see `hierens.models.ordering.reorder`."""
        return reorder(self, loader)

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
        reasons = {str(i): level.fallback_reason for i, level in enumerate(self.all_levels())}
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


class FusedEnsemble(HierarchicalEnsemble):
    """What `fuse` makes: an ensemble for inference, on any device, that also runs its sub-trees and compiles.

    Its weights may be loaded (also with `assign=True`), written in place, cast and moved, at any time, and threads may
    share it. Reordered weights follow, and take about the memory of the weights once more. Only what is written through
    `.data` into the memory of a weight goes unseen, for torch keeps no record of it. Hooks of the model itself and of
    its levels are called, gradients flow to images and to weights that ask for them.

    The layers inside its blocks run without their modules. So a hook there and a layer that was replaced (by another
    one, a quantised one, an adapter, a parametrised one) are refused at the next call.
    """

    _layers: LayersSeen

    def watch_layers(self) -> None:
        """Take the layers as they are now for those that run."""
        self._layers = LayersSeen(level for level in self.all_levels() if isinstance(level, FusedLevel))

    def with_levels(self, *args: Any, **kwargs: Any) -> Any:
        """See `HierarchicalEnsemble.with_levels`."""
        other = super().with_levels(*args, **kwargs)
        if isinstance(other, FusedEnsemble):
            other.watch_layers()
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found out again."""
        return {name: value for name, value in super().__getstate__().items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch_layers()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As every module's; weights that are not finite give what they give unfused, more slowly."""
        found = super().load_state_dict(*args, **kwargs)
        attach_activations(self)
        return found

    def train(self, mode: bool = True) -> FusedEnsemble:
        """Stay in evaluation mode.

        Raises:
            ValueError: training was asked for.
        """
        if mode:
            refuse("trained")
        super().train(False)
        return self

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """As `HierarchicalEnsemble.forward`; images that are not finite give what they give unfused, more slowly."""
        if attached_activations_are_safe(x):
            return super().forward(x, depth, leaves, reduce)
        with separate_activations():
            return super().forward(x, depth, leaves, reduce)

    def forward_features(self, x: Tensor, depth: int | None = None, leaves: int | None = None) -> Tensor:
        """As `HierarchicalEnsemble.forward_features`; for images that are not finite, as `forward`."""
        with contextlib.nullcontext() if attached_activations_are_safe(x) else separate_activations():
            return super().forward_features(x, depth, leaves)

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """As `HierarchicalEnsemble.anytime`; for images that are not finite, as `forward`."""
        walk = super().anytime(x)
        return walk if attached_activations_are_safe(x) else with_separate_activations(walk)

    def _prepared(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._layers.check()
        return super()._prepared(x).contiguous(memory_format=torch.channels_last)

    def fold_norms(self) -> FusedEnsemble:
        """Itself: that is done."""
        return self

    def fuse(self) -> NoReturn:
        """Raise a ValueError."""
        refuse("fused once more")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: the model that this one was made from is what to save."""
        refuse("saved")

    def grow(self) -> NoReturn:
        """Raise a ValueError."""
        refuse("grown")

    def reorder(self, loader: Any) -> NoReturn:
        """Raise a ValueError."""
        refuse("reordered")

    def reset_classifier(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError."""
        refuse("given another classifier")

    def break_symmetry(self, noise: float = 0.01, seed: int = 0) -> NoReturn:
        """Raise a ValueError."""
        refuse("changed")
