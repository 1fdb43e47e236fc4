"""A model at one depth as a graph for other runtimes, with fixed executors and folded batch norms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hierens.branches.activations import Activations
from hierens.branches.executor import AnyLevel
from hierens.branches.fused_level import FusedLevel
from hierens.branches.light import tie
from hierens.core.adaptive_base import AdaptiveBase
from hierens.export.formats import INPUT

TRACED_BATCH = 2  # torch.export would treat a batch size of one as a constant


class _SeparateBranches(nn.Module):
    """A level with a module per branch, since slices of packed weights would remain slices in the graph."""

    def __init__(self, level: FusedLevel) -> None:
        super().__init__()
        parts = [level.part(branch, branch + 1) for branch in range(level.branches)]
        tie(parts)
        self.branches = nn.ModuleList(parts)

    def forward(self, x: Activations, parents: Any = None) -> Activations:
        values = x.some(range(x.count) if parents is None else parents).listed()
        branches: list[Any] = list(self.branches)
        return Activations([level.run_branch(0, v) for level, v in zip(branches, values, strict=True)])


class _Inputs(nn.Module):
    """A model whose only input is `images`, a name that every runtime shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def for_inference(model: AdaptiveBase) -> AdaptiveBase:
    """A copy in single precision on the CPU, in evaluation mode, with the batch norms of its blocks folded."""
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval()
    plain.gradient_equilibrium = False
    plain.set_grad_checkpointing(False)
    return plain.fold_norms().requires_grad_(False)


def graph(
    model: AdaptiveBase, depth: int, size: tuple[int, ...], separate: bool = False, largest_batch: int | None = None
) -> ExportedProgram:
    """The graph of one depth, from `images` (N, C, H, W) to logits (N, classes); N is dynamic.

    Args:
        model: from `for_inference`.
        depth: the depth.
        size: of an image, (C, H, W).
        separate: whether levels with token layers become a module per branch, since quantisation does not support one
            batched product of all branches' matrices.
        largest_batch: for runtimes that need it; they need contiguous layouts as well.
    """
    part: Any = model.at_depth(depth)
    for name, level in list(part.named_modules()):
        if isinstance(level, AnyLevel):
            level.executor = "grouped"
            last = name.rpartition(".")[2] in ("head", "classifier")
            part.set_submodule(name, _separated(level, separate and not last))
    if largest_batch is not None:
        part = part.to(memory_format=torch.contiguous_format)
    return program(_Inputs(part), {INPUT: torch.zeros(TRACED_BATCH, *size)}, largest_batch, largest_batch is not None)


def program(
    module: nn.Module, inputs: dict[str, Tensor], largest_batch: int | None = None, contiguous: bool = False
) -> ExportedProgram:
    """The graph of a module.

    Args:
        module: takes the inputs by name.
        inputs: examples, by name; the first dimension of `images` is dynamic.
        largest_batch: for runtimes that need it.
        contiguous: whether to leave out changes of the memory layout; the module's weights must be contiguous.
    """
    shapes = {name: {0: Dim("batch", max=largest_batch)} if name == INPUT else {} for name in inputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its internals
        found = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
    for node in list(found.graph.nodes):
        node.meta.pop("stack_trace", None)  # it names files of this machine
        if contiguous and node.target is torch.ops.aten.contiguous.default:
            node.replace_all_uses_with(node.args[0])
            found.graph.erase_node(node)
    return found


def _separated(level: AnyLevel, separate_tokens: bool) -> nn.Module:
    """A level that runs all branches in one call, or, if this is impossible or unwanted, as a module per branch."""
    level.plan = {}
    one_call = level.grouped and (level.channelwise or not separate_tokens)
    if one_call or level.branches == 1 or not isinstance(level, FusedLevel):
        return level
    return _SeparateBranches(level)
