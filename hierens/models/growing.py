"""Adds a level to a tree: the last block is cut in two, and every leaf gets a sibling.

The second half of the last block is copied for both children of a former leaf, so the outputs do not change at first.
A tree can be trained small and grown, and a converted network can get more levels without converting it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from hierens.branches.intermediates import parted, tapped_block
from hierens.branches.level import Level, sharing_tensors
from hierens.branches.light import called_layers, fresh_factors, lighten
from hierens.branches.self_check import reasons_to_loop
from hierens.branches.tensors import state_of
from hierens.core.modes import ordinary_tensors
from hierens.core.tree import Tree
from hierens.cutting.cut import CutError, cut, next_cut
from hierens.models.level_tree import LevelTree

Grown = TypeVar("Grown", bound=LevelTree)


@ordinary_tensors
def grow(model: Grown) -> Grown:
    """A new model with one more level, twice the leaves, and equal outputs.

    The last block is cut where its cost is divided most equally (its second part includes the leaf's head). Both
    children of a former leaf hold copies of its weights. The outputs of depth b are therefore those of depth b - 1
    before, and the outputs of depth 0 do not change.

    Args:
        model: the model to grow; it is not changed.

    Raises:
        CutError: the last block cannot be cut, or blocks share weights.
    """
    network, at = _Network(model.at_depth(0)), model._model_args["at"]
    cutting = cut(network, at=[*at, next_cut(network, at)])
    *levels, last, head, classifier = (level for level in model.all_levels() if isinstance(level, Level))
    leaves = model.tree.leaves
    branches = [*(1 for _ in levels), last.branches, 2 * last.branches, 1, 1]  # only the two new levels are checked
    parts = list[nn.Module](cutting.parts)
    if (kind := model.member_kinds[-1]) != "full":
        called = [set(last.light)] * len(parts)
        if last.branches == 1:  # an ordinary level, whose copies become light
            called = called_layers(parts, model.pretrained_cfg["input_size"])
        for index in (i for i, count in enumerate((*branches[:-2], 2, 2)) if i >= len(levels) and count > 1):
            parts[index] = lighten(sharing_tensors(parts[index]), kind, model._model_args.get("rank"), called[index])
    reasons = reasons_to_loop(parts, network, branches)
    upper, lower = (
        _level_of(parts[index], last, copies, reasons.get(str(index), ""))
        for index, copies in ((len(levels), 1), (len(levels) + 1, 2))
    )
    grown: Grown = model.with_levels(
        Tree((*model.tree.branching, 2), 2 * leaves),
        [*(level.first_branches(level.branches) for level in levels), upper, lower],
        _level_of(head.first() if head.branches > 1 else parts[-2], head, 2, head.fallback_reason),
        _level_of(classifier.first() if head.branches > 1 else parts[-1], classifier, 2, classifier.fallback_reason),
    )
    if isinstance(kinds := model._model_args.get("members"), list):
        grown._model_args["members"] = [*kinds, kinds[-1]]
    grown._model_args["at"] = list(cutting.at)
    grown._stages = tuple(
        replace(new, normed=old.normed) for new, old in zip(cutting.stages, model._stages, strict=False)
    )
    return grown


def _level_of(block: nn.Module, source: Level, copies: int, reason: str) -> Level:
    """A level of a block, or of a part of it, with `copies` branches for every branch of its source.

    Args:
        block: the block.
        source: the level whose weights and executor the new one gets.
        copies: new branches with the weights of each branch.
        reason: why the level must be looped, or an empty string.
    """
    own = [dict(state_of(branch)) for branch in source for _ in range(copies)]
    level = Level.of_copies(block, len(own), lambda branch: fresh_factors(block) | own[branch])
    level.executor, level.fallback_reason = source.executor, reason
    return level.train(source.training)


class _Network(nn.Module):
    """The blocks, head and classifier of a tree of one leaf, joined to the backbone that they were cut from.

    Modules have the backbone's own names, so that the same cuts can be made in the backbone when a model is loaded.
    """

    def __init__(self, single: LevelTree) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.num_features = single.in_chans, single.num_classes, single.num_features
        self.pretrained_cfg = {"input_size": single.pretrained_cfg["input_size"]}
        self._classifier_names = single.classifier_names
        blocks: Sequence[Any] = [
            branch for level in single.all_levels() if isinstance(level, Level) for branch in level
        ]
        names = list(chain.from_iterable(block.state_dict() for block in blocks))
        if len(names) != len(set(names)):
            raise CutError("blocks of this backbone share weights: call hierensify with more blocks instead.")
        for block in blocks:
            for node in block.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._adopt(node.target, block)
        # In plain lists, because the modules are already registered under their own names.
        self._pieces = [fx.GraphModule(self, block.graph) for block in blocks]
        self._stages = [stage for stage in single._stages if stage.node]
        self.feature_info = [stage.info for stage in self._stages]
        self._tapped = [
            (fx.GraphModule(self, tapped_block(block, nodes).graph), len(nodes), block.returns_one)
            for index, block in enumerate(blocks[:-2])
            for nodes in [tuple(stage.node for stage in self._stages if stage.level == index)]
        ]
        if len(self._pieces[-2].graph.find_nodes(op="placeholder")) > 1:
            raise CutError("this backbone cannot be grown: its head reads several values.")

    def _adopt(self, target: str, block: fx.GraphModule) -> None:
        *path, name = target.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if hasattr(owner, name):
            return  # a module without weights that is used in two blocks
        value = getattr(block.get_submodule(".".join(path)), name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            persistent = target in block.state_dict()
            owner.register_buffer(name, value, persistent)
        else:
            setattr(owner, name, value)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(name) for name in self._classifier_names)

    def forward_features(self, x: Any) -> Any:
        return self._run(self._pieces[:-2], x)

    def forward(self, x: Any) -> Any:
        return self._run(self._pieces[-2:], self.forward_features(x))

    def forward_intermediates(self, x: Any, norm: bool = False) -> tuple[Any, list[Any]]:
        """The maps of the stages; `norm` is ignored."""
        value, found = x, list[Tensor]()
        for piece, taps, returns_one in self._tapped:
            value, own = parted(self._run([piece], value), taps, returns_one)
            found += own
        return value, [stage.to_map.forward(x, tap) for stage, tap in zip(self._stages, found, strict=True)]

    @staticmethod
    def _run(pieces: Sequence[fx.GraphModule], value: Any) -> Any:
        for piece in pieces:
            # Not called as a module, so that a trace contains only the backbone's own modules.
            value = piece.forward(*value) if isinstance(value, tuple) else piece.forward(value)
        return value
