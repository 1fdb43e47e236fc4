"""`TreeWithExits`: a tree of networks with exits in its first network.

There is one exit after each level but the last, on the path to the first leaf. Exits are for budgets below the cost of
one network, as in a multi-exit network; the nested ensembles are for larger budgets, as in a tree.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.executor import Executor
from hierens.branches.intermediates import Nodes
from hierens.core.block_values import is_empty, select_samples
from hierens.core.equilibrium import scaled
from hierens.core.macs import count_macs
from hierens.core.modes import ordinary_tensors
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.core.tree import nested_sizes
from hierens.models.adaptive import Adaptive
from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.heads import ConvExit, HeadKind, PooledExit
from hierens.models.multi_exit import MultiExit

_OWN_NAMES = ("architecture", "first_conv", "classifier")  # fields of `pretrained_cfg` that differ from the tree's


class TreeWithExits(Adaptive):
    """A tree of networks with exits in its first network. `tree_with_exits` creates it.

    Its leaves are the exits in order, and then the networks. The first depths are single exits. After them come the
    nested ensembles of 1, 2, 4, ... networks, in whose mean the exits are not included.

    Attributes:
        exits: the heads, in order; exit l reads the output of the first branch of level l.
    """

    architecture = "hne_exits"
    unit: ClassVar[str] = "exits and networks"

    def __init__(self, networks: HierarchicalEnsemble, exits: Sequence[PooledExit | ConvExit], head: HeadKind) -> None:
        """Add exits to a tree.

        Args:
            networks: the tree, which becomes part of the model.
            exits: a head for every level but the last.
            head: the kind of these heads.
        """
        super().__init__(networks.info.renamed("levels.0.", "networks.levels.0."))
        self._modules["networks"] = networks  # not add_module, which would read the property of that name
        self.exits = nn.ModuleList(exits)
        self.grad_checkpointing = networks.grad_checkpointing
        self._model_args["head"] = head
        names = networks.pretrained_cfg["classifier"]
        own = [f"networks.{name}" for name in ([names] if isinstance(names, str) else names)]
        self.pretrained_cfg["classifier"] = (*(f"exits.{i}.classifier" for i in range(len(exits))), *own)
        self.train(networks.training)

    @property
    def _tree(self) -> HierarchicalEnsemble:
        """The tree, whose `pretrained_cfg` may be older than the model's."""
        tree = self._modules["networks"]
        assert isinstance(tree, HierarchicalEnsemble)
        return tree

    @property
    def networks(self) -> HierarchicalEnsemble:
        """The tree alone, which is also a model: to fuse, to tune, or to save without exits.

        Reading it copies this model's description of images and classes to the tree's `pretrained_cfg`, because both
        are plain dictionaries that users and timm may change at any time.
        """
        shared = {key: value for key, value in self.pretrained_cfg.items() if key not in _OWN_NAMES}
        self._tree.pretrained_cfg.update(shared)
        return self._tree

    @property
    def levels(self) -> nn.ModuleList:  # type: ignore[override]
        """The tree's levels."""
        return self._tree.levels

    @property
    def prediction_weights(self) -> PredictionWeights:
        """Each exit alone, then the means of the first 1, 2, 4, ... networks."""
        num_exits = len(self.exits)
        ensembles = nested_sizes(self._tree.tree.leaves)
        sizes = (*range(1, num_exits + 1), *(num_exits + size for size in ensembles))
        return PredictionWeights(sizes, num_exits=num_exits)

    @property
    def gradient_equilibrium(self) -> bool | Literal["all"]:
        """Whether every branch gets the mean, not the sum, of the gradients of the exits and networks after it."""
        return self._tree.gradient_equilibrium

    @gradient_equilibrium.setter
    def gradient_equilibrium(self, on: bool | Literal["all"]) -> None:
        self._tree.gradient_equilibrium = on

    @property
    def symmetric(self) -> Any:
        """Whether any two networks have equal weights."""
        return self._tree.symmetric

    def break_symmetry(self, noise: float = 0.01, seed: int = 0, signs: bool = False) -> None:
        """Make networks with equal weights differ: see `HierarchicalEnsemble.break_symmetry`."""
        self._tree.break_symmetry(noise, seed, signs)

    def set_executor(self, executor: Executor) -> None:
        """Set how levels are run: see `LevelTree.set_executor`."""
        self._tree.set_executor(executor)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        self._tree.set_grad_checkpointing(enable)

    # --- forward pass -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Logits of an exit, or mean logits of the first networks; nothing after them is run.

        Args:
            x: images (N, C, H, W).
            depth: first the exits, then 1, 2, 4, ... networks; all by default.
            leaves: number of exits and networks, instead of a depth.
            reduce: False returns the logits of each exit and network, the input of the objectives.

        Returns:
            (N, classes), or (N, leaves, classes) if not `reduce`.

        Raises:
            ValueError: depth or leaves out of range, or images of another shape than the model takes.
        """
        count = self.leaves_at(depth, leaves)
        x = self._prepared(x)
        if is_empty(x):
            return self._no_logits(x, count, reduce)
        exits_run, networks = self._split(count)
        levels = self._tree.forward_levels(x, networks, exits_run)
        outputs = []
        for index, exit in enumerate(self.exits[:exits_run]):
            value = next(levels).listed()[0]
            if self.gradient_equilibrium:
                value = scaled(value, 1 / self._tree.num_outputs_below(index, networks, exits_run)[0])
            outputs.append(exit(value))
        if networks:
            outputs += self._tree.leaf_logits(next(levels)).unbind(1)
        if reduce:
            return outputs[-1] if networks < 2 else torch.stack(outputs[exits_run:], 1).mean(1)
        return torch.stack(outputs, 1)

    def _split(self, leaves: int) -> tuple[int, int]:
        """The number of exits and of networks among the first leaves."""
        exits_run = min(leaves, len(self.exits))
        return exits_run, leaves - exits_run

    def _levels_run(self, leaves: int) -> int:
        return len(self.levels) if leaves > len(self.exits) else leaves

    def _forward_stages(self, x: Tensor, leaves: int, nodes: Nodes) -> Iterator[tuple[Activations, list[int]]]:
        exits_run, networks = self._split(leaves)
        return self._tree._forward_stages(x, networks, nodes, exits_run)

    def _drop_heads(self) -> None:
        self._tree._drop_heads()
        self.exits = nn.ModuleList(nn.Identity() for _ in self.exits)

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions exit by exit, then network by network; every activation is computed once.

        Images can leave on the way, as in `LevelTree.anytime`.

        Args:
            x: images (N, C, H, W).

        Yields:
            After each exit or network a prediction equal to `forward(x, leaves=step.leaves)`.
        """
        x = self._prepared(x)
        return self._walk_of_none(x) if is_empty(x) else self._walk([x], tuple(x.shape[1:]))

    @torch.no_grad()
    def _walk(self, path: list[Any], size: tuple[int, ...]) -> Generator[Step, Tensor | None, None]:
        for index, exit in enumerate(self.exits):
            path.append(self._first_branch(index, path[-1]))
            logits = exit(path[-1])
            kept = yield Step(index + 1, logits, self.cost(index + 1, size), logits)
            if kept is not None:
                path = [select_samples(value, kept, len(logits)) for value in path]
        walk, kept = self._tree.walk(path, size), None
        for _ in range(self._tree.leaves):
            step = walk.send(kept)
            leaves = len(self.exits) + step.leaves
            kept = yield Step(leaves, step.logits, self.cost(leaves, size), step.newest)

    def _first_branch(self, index: int, value: Any) -> Any:
        return self._tree.level(index).run_branch(0, value)

    @ordinary_tensors
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> TreeWithExits | MultiExit:
        """A new model with only the part that a depth needs; at an exit, a `MultiExit` that ends there."""
        exits_run, networks = self._split(self.leaves_at(depth, leaves))
        exits: Any = copy.deepcopy(self.exits[:exits_run])
        if networks:
            return TreeWithExits(self.networks.at_depth(leaves=networks), exits, self._model_args["head"])
        blocks = [self._tree.level(index).first_branches(1).first() for index in range(exits_run)]
        info = self.info.renamed("networks.levels.0.0.", "levels.0.")
        info.model_args = {key: info.model_args[key] for key in ("backbone", "backbone_args", "at", "head")}
        info.model_args.update(collaborate=False, weights=None, learn_weights=False)
        chain = MultiExit(blocks, exits, info)
        chain.gradient_equilibrium, chain.grad_checkpointing = self.gradient_equilibrium, self.grad_checkpointing
        return chain.train(self.training)

    def fold_norms(self) -> TreeWithExits:
        """See `Adaptive.fold_norms`."""
        self.add_module("networks", self.networks.fuse())
        return self

    # --- cost -------------------------------------------------------------------------------------------------------

    def exit_macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """MACs of the head of each exit for one image (C, H, W)."""
        return self._counted(size, self._count_exits)

    def _count_exits(self, size: tuple[int, ...]) -> tuple[int, ...]:
        levels = [self._tree.level(index) for index in range(len(self.exits))]

        def one_branch_and_exit_each(copies: Any, value: Any) -> Iterator[Any]:
            for level, exit in zip(*copies, strict=True):
                value = level.run_branch(0, value)
                yield value
                yield exit(value)

        return count_macs(nn.ModuleList([nn.ModuleList(levels), self.exits]), size, one_branch_and_exit_each)[1::2]

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first exits and networks for one image (C, H, W)."""
        size = self.image_size(size)
        exits_run, networks = self._split(self.leaves if leaves is None else leaves)
        levels = self._tree.cost(networks, size) if networks else sum(self._tree.branch_macs(size)[:exits_run])
        return levels + sum(self.exit_macs(size)[:exits_run])

    def parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters of each depth."""
        of_exits = [sum(p.numel() for p in exit.parameters()) for exit in self.exits]
        levels = [self._tree.level(index) for index in range(len(self.exits))]
        of_levels = [level.parameters_of(1) for level in levels]
        exits_run = [sum(of_levels[:count]) + sum(of_exits[:count]) for count in range(1, len(of_exits) + 1)]
        return (*exits_run, *(count + sum(of_exits) for count in self._tree.parameter_counts()))

    # --- timm's interface -------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of each network before pooling, (N, networks, ...), without the exits."""
        return self._tree.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean logits of the networks from the result of `forward_features`, or with `pre_logits` pooled features."""
        return self._tree.forward_head(x, pre_logits)

    def get_classifier(self) -> Any:
        """The networks' classifiers: see `LevelTree.get_classifier`."""
        return self._tree.get_classifier()

    @ordinary_tensors
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of all exits and networks by new ones.

        Raises:
            ValueError: no classes, a change of pooling, or a classifier other than a linear layer.
        """
        if num_classes < 1:
            raise ValueError("exits need one class or more: use `model.networks` for features.")
        self._tree.reset_classifier(num_classes, global_pool)
        for exit in self.exits:
            assert isinstance(exit, (PooledExit, ConvExit))
            exit.reset(num_classes)
        self._count_classes(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to which the backbone applies no weight decay."""
        return {f"networks.{name}" for name in self._tree.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's layer groups, for layer-wise learning rates: a group per level, the heads last."""
        return {"stem": r"^networks\.levels\.0\.", "blocks": r"^networks\.levels\.(\d+)\."}

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The arguments with which the entry point `hne_exits` rebuilds the model."""
        return {**self._tree.arguments(), **super().arguments()}

    def backbone_parts(self) -> Iterator[nn.Module]:
        """The branches of all levels."""
        return self._tree.backbone_parts()
