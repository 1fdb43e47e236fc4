"""A model at one depth as a graph that other runtimes can take: no choice of executor in it, batch norms folded."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from hierens.branches.fused_level import FusedLevel
from hierens.branches.fusing import FusedEnsemble, fold
from hierens.branches.level import Activations, AnyLevel
from hierens.branches.packing_rules import PackError
from hierens.core.adaptive import Adaptive
from hierens.models.ensemble import HierarchicalEnsemble
from hierens.models.exits import MultiExit
from hierens.models.tree_exits import TreeWithExits

_TRACED_BATCH = 2  # torch.export takes a batch of one for a constant


class _Apart(nn.Module):
    """A level whose branches are modules of their own: sliced weights would stay slices in the graph."""

    def __init__(self, level: FusedLevel) -> None:
        super().__init__()
        self.branches = nn.ModuleList(level.part(branch, branch + 1) for branch in range(level.branches))

    def forward(self, x: Activations, parents: Any = None) -> Activations:
        values = x.some(range(x.count) if parents is None else parents).listed()
        branches: list[Any] = list(self.branches)
        return Activations([level.run_branch(0, v) for level, v in zip(branches, values, strict=True)])


class _Inputs(nn.Module):
    """A model that takes images only, under a name that every runtime shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def for_inference(model: Adaptive) -> Adaptive:
    """A copy in single precision on the CPU, in evaluation mode, with the batch norms of its blocks folded."""
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval()
    plain.gradient_equilibrium = False
    plain.set_grad_checkpointing(False)
    if isinstance(plain, HierarchicalEnsemble) and not isinstance(plain, FusedEnsemble):
        plain = plain.fuse()
    if isinstance(plain, TreeWithExits):
        plain.add_module("networks", plain.networks.fuse())
    if isinstance(plain, MultiExit):
        plain.levels = nn.ModuleList(_folded(level) for level in plain.levels)
    return plain.requires_grad_(False)


def _folded(block: nn.Module) -> nn.Module:
    assert isinstance(block, fx.GraphModule)
    with contextlib.suppress(PackError):  # it cannot be traced to its layers; runtimes fold for themselves
        return fold(copy.deepcopy(block))
    return block


def graph(
    model: Adaptive, depth: int, size: tuple[int, ...], apart: bool = False, largest_batch: int | None = None
) -> ExportedProgram:
    """The graph of one depth, from `images` (N, C, H, W) to logits (N, classes); N is free.

    Args:
        model: what `for_inference` made.
        depth: the depth.
        size: of an image, (C, H, W).
        apart: whether levels with token layers become a module per branch, since one product of all branches' matrices
            is nothing that quantisation knows.
        largest_batch: the most images at a time, for runtimes that must know; they want plain layouts, too.
    """
    part: Any = model.at_depth(depth)
    tree = part.networks if isinstance(part, TreeWithExits) else part
    if isinstance(tree, HierarchicalEnsemble):
        tree.set_executor("grouped")
        tree.levels = nn.ModuleList(_taken_apart(level, apart) for level in tree.levels)
        for last in ("head", "classifier"):
            setattr(tree, last, _taken_apart(getattr(tree, last)))
    if largest_batch is not None:
        part = part.to(memory_format=torch.contiguous_format)
    images = torch.zeros(_TRACED_BATCH, *size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own workings
        shapes = {"images": {0: Dim("batch", max=largest_batch)}}
        program = torch.export.export(_Inputs(part), (images,), dynamic_shapes=shapes, strict=False)
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # which names files of the machine that exports
        if largest_batch is not None and node.target is torch.ops.aten.contiguous.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def _taken_apart(level: nn.Module, tokens: bool = False) -> nn.Module:
    """A level that runs all its branches in one call, or as one module each if it cannot (or `tokens`: should not)."""
    assert isinstance(level, AnyLevel)
    level.plan = {}
    together = level.grouped and (level.channelwise or not tokens)
    return _Apart(level) if isinstance(level, FusedLevel) and level.branches > 1 and not together else level
