"""A tree of levels as a network: its forward pass, its cost, and the interface that timm's tools need."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.executor import AnyLevel, Executor
from hierens.branches.intermediates import Nodes, tapped
from hierens.branches.level import Level
from hierens.branches.light import SCALES, factor_names
from hierens.core.adaptive_base import mean_of_heads
from hierens.core.block_values import is_empty, select_samples
from hierens.core.equilibrium import scale_gradient, scaled
from hierens.core.model_info import ModelInfo
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.core.tree import Tree, nested_sizes
from hierens.evaluation.profiling import branch_macs
from hierens.models.leaf_classifiers import LeafClassifiers

BRANCH_PREFIX = re.compile(r"^(levels\.\d+|head|classifier)\.\d+\.")  # of a parameter, before the backbone's own name


class LevelTree(LeafClassifiers):
    """The levels of a tree, and a head and a classifier per leaf.

    Attributes:
        tree: the arithmetic of levels, widths and leaves.
        levels: the B + 1 levels; level l holds the copies of block l.
        head: per leaf, from the features to the classifier.
        classifier: per leaf, the last linear layer.
        num_classes: number of classes.
        in_chans: image channels.
        pretrained_cfg: timm's description of the model and its preprocessing.
        classifier_names: the backbone's names of its last linear layer (two for a distilled backbone).
        gradient_equilibrium: whether every branch gets the mean, not the sum, of the gradients of the leaves below it;
            off by default. See `hierens.core.equilibrium`.
    """

    def __init__(
        self, tree: Tree, levels: Sequence[AnyLevel], head: AnyLevel, classifier: AnyLevel, info: ModelInfo
    ) -> None:
        """Create a tree.

        Args:
            tree: the arithmetic of levels, widths and leaves.
            levels: one per level, with as many branches as the tree has there.
            head: a branch per leaf, from the features to the classifier.
            classifier: a branch per leaf, the last linear layer.
            info: the record of the backbone or of another tree.
        """
        super().__init__(info)
        self.tree, self.levels = tree, nn.ModuleList(levels)
        self.head: Any = head
        self.classifier: Any = classifier
        self._model_args.update(branching=list(tree.branching), leaves=tree.leaves)
        self._name_classifiers()

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
        """A new model (of this class, or of `kind`) with the record and settings of this one and other levels."""
        other = (kind or type(self))(tree, levels, head, classifier, self.info)
        other.gradient_equilibrium, other.grad_checkpointing = self.gradient_equilibrium, self.grad_checkpointing
        other.training = self.training
        return other

    @property
    def prediction_weights(self) -> PredictionWeights:
        """Depth b is the mean of the first 2^b leaves (eq. 5)."""
        return PredictionWeights(nested_sizes(self.tree.leaves))

    # --- forward pass -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Mean logits of the first networks; only their sub-tree is run (eq. 5).

        Args:
            x: images (N, C, H, W).
            depth: run the first 2^depth networks.
            leaves: run this many networks, instead of a depth; all by default.
            reduce: False returns the logits of each network, the input of the objectives.

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

    def forward_levels(
        self, x: Tensor, leaves: int, exits: int = 0, nodes: Mapping[int, tuple[str, ...]] = {}
    ) -> Iterator[Activations]:
        """The output of each level for the first leaves. Each level is run when its output is requested.

        Args:
            x: images (N, C, H, W), as `_prepared` returns them.
            leaves: number of networks that will be evaluated; 0 runs the first branch of each level only.
            exits: number of those first branches with an exit that will be evaluated, for gradient equilibrium.
            nodes: by level, the values to return as `taps`.
        """
        activations = Activations([x])
        for index, level in enumerate(self.levels):
            parents = [self.tree.parent(index, branch) for branch in range(self.tree.width(index, max(leaves, 1)))]
            if self.gradient_equilibrium and index > 0:
                activations, parents = self._with_mean_gradients(index, activations, parents, (leaves, exits))
            activations = self._run(tapped(level, nodes[index]) if index in nodes else level, activations, parents)
            yield activations

    def _with_mean_gradients(
        self, index: int, above: Activations, parents: list[int], evaluated: tuple[int, int]
    ) -> tuple[Activations, list[int]]:
        """The inputs of a level, with gradients scaled so that every branch gets the mean over the outputs below it."""
        of_parents, of_own = (self.num_outputs_below(level, *evaluated) for level in (index - 1, index))
        shares = [own / of_parents[parent] for own, parent in zip(of_own, parents, strict=True)]
        if set(shares) == {1.0}:
            return above, parents
        if len(set(shares)) == 1:
            return above.mapped(partial(scale_gradient, factor=shares[0])), parents
        values = above.listed()
        own = [scaled(values[parent], share) for parent, share in zip(parents, shares, strict=True)]
        return Activations(own), list(range(len(own)))

    def num_outputs_below(self, index: int, leaves: int, exits: int = 0) -> list[int]:
        """Number of outputs below each branch of a level: networks, and the exits on the path to the first network."""
        span = self.tree.span(index)
        counts = [min(leaves - branch * span, span) for branch in range(self.tree.width(index, max(leaves, 1)))]
        counts[0] += max(exits - index, 0)
        return counts

    def _forward_stages(
        self, x: Tensor, leaves: int, nodes: Nodes, exits: int = 0
    ) -> Iterator[tuple[Activations, list[int]]]:
        for index, activations in enumerate(self.forward_levels(x, leaves, exits, nodes)):
            yield activations, self.num_outputs_below(index, max(leaves, 1))

    def _features(self, x: Tensor, leaves: int) -> Activations:
        for activations in self.forward_levels(x, leaves):
            features = activations  # of the last level; earlier activations are freed
        return features

    def leaf_logits(self, features: Activations) -> Tensor:
        """Logits of each leaf, (N, leaves, classes), from the output of the last level."""
        logits: Tensor = self._run(self.classifier, self._run(self.head, features)).stacked()
        return logits

    def _logits(self, features: Activations, reduce: bool) -> Tensor:
        logits = self.leaf_logits(features)
        return logits.mean(1) if reduce else logits

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions leaf by leaf: a depth-first walk of the tree that computes every activation once.

        Images can leave on the way: `walk.send(kept)` continues with the rows of the last step whose indices (K,) are
        given in ascending order, and returns the next step, for K images.

        Args:
            x: images (N, C, H, W).

        Yields:
            After each leaf the mean logits so far, equal to `forward(x, leaves=step.leaves)`.
        """
        x = self._prepared(x)
        return self._walk_of_none(x) if is_empty(x) else self.walk([x], tuple(x.shape[1:]))

    @torch.no_grad()
    def walk(self, path: list[Any], size: tuple[int, ...]) -> Generator[Step, Tensor | None, None]:
        """`anytime`, continued after some levels of the first leaf's path have been run.

        Args:
            path: the images, and the output of each level that has been run.
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

    # --- smaller trees, executors -----------------------------------------------------------------------------------

    @ordinary_tensors
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> Self:
        """A new model with only the sub-tree of a depth (or of the first `leaves` networks).

        At depth 0 it is an ordinary network: the backbone's layers with the first leaf's weights.
        """
        tree = self.tree.prefix(self.tree.leaves_at(depth, leaves))
        levels = [self.level(i).first_branches(w) for i, w in enumerate(tree.widths())]
        smaller: Self = self.with_levels(
            tree, levels, self.head.first_branches(tree.leaves), self.classifier.first_branches(tree.leaves)
        )
        return smaller

    @property
    def looped(self) -> dict[str, str]:
        """The reason for each level that has no grouped form, by index; the head and the classifier come last."""
        reasons = {str(i): level.fallback_reason for i, level in enumerate(self.all_levels())}
        return {index: reason for index, reason in reasons.items() if reason}

    def set_executor(self, executor: Executor) -> None:
        """Set how levels are run: `looped`, `grouped` where possible, or `auto`, by device and batch size.

        Raises:
            ValueError: an unknown executor.
        """
        if executor not in ("auto", "looped", "grouped"):
            raise ValueError(f"executor must be 'auto', 'looped' or 'grouped', got {executor!r}.")
        for level in self.all_levels():
            level.executor = executor

    # --- cost -------------------------------------------------------------------------------------------------------

    def branch_macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """MACs of one branch of each level for one image (C, H, W); the last level includes a leaf's head."""
        return self._counted(size, self._count_branches)

    def _count_branches(self, size: tuple[int, ...]) -> tuple[int, ...]:
        *blocks, head, classifier = branch_macs(self.all_levels(), size)
        return (*blocks[:-1], blocks[-1] + head + classifier)

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first leaves (all by default) for one image (C, H, W)."""
        return int(self.tree.cost(self.branch_macs(size), leaves))

    def parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters in the sub-tree of each depth."""
        levels = self.all_levels()
        widths = ((*self.tree.prefix(n).widths(), n, n) for n in nested_sizes(self.tree.leaves))
        return tuple(sum(level.parameters_of(w) for level, w in zip(levels, own, strict=True)) for own in widths)

    # --- timm's interface, saving -----------------------------------------------------------------------------------

    def forward_features(self, x: Tensor, depth: int | None = None, leaves: int | None = None) -> Tensor:
        """Features of each leaf before pooling: the backbone's `forward_features`, stacked to (N, leaves, ...)."""
        return self._features(self._prepared(x), self.tree.leaves_at(depth, leaves)).stacked()

    def forward_head(self, x: Tensor, pre_logits: bool = False, reduce: bool = True) -> Tensor:
        """Mean logits from the result of `forward_features`, or with `pre_logits` mean pooled features."""
        features = Activations.unstacked(x)
        if pre_logits:
            pooled = mean_of_heads(self._run(self.head, features).stacked())
            return pooled.mean(1) if reduce else pooled
        return self._logits(features, reduce)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to which the backbone applies no weight decay, and of the scales of light layers."""
        names = {name for name, _ in self.named_parameters() if BRANCH_PREFIX.sub("", name) in self._no_weight_decay}
        return names | factor_names(self, SCALES)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups, for layer-wise learning rates: a group per level, the classifier last."""
        return {"stem": r"^levels\.0\.", "blocks": r"^levels\.(\d+)\."}

    def arguments(self) -> dict[str, Any]:
        """The arguments with which the entry point `hne` rebuilds the model."""
        return {**super().arguments(), "looped": self.looped}

    def backbone_parts(self) -> Iterator[nn.Module]:
        """The branches of all levels."""
        return (branch for level in self.all_levels() if isinstance(level, Level) for branch in level)
