"""Divides a backbone into a sequence of blocks, and verifies that their composition equals the backbone.

The coarse trace is cut such that the blocks have about equal MACs. Modules with too many MACs are opened first,
beginning with the most expensive.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from hierens.core.modes import evaluating, ordinary_tensors
from hierens.core.timm_info import example_input
from hierens.core.tree import checked_integer
from hierens.cutting.backbones import classifier_names, described
from hierens.cutting.fx_tracer import CutError, ancestors
from hierens.cutting.trace import CoarseTrace, CutPoint, Cutting

__all__ = [
    "CutError",
    "CutPoint",
    "Cutting",
    "cut",
    "cut_points",
    "next_cut",
]

_UNEVEN = 1.6  # modules are opened while a block has more than this multiple of an equal share of the MACs
# Penalties, added to the sum of squared shares:
_OFF_STAGE = 0.02  # for a cut within a stage
_SEVERAL = 0.1  # for a cut that several tensors cross
_OTHER = 1.0  # for a cut that other values cross, such as sizes: chosen only if there is no other
_TINY = 4.0  # for a block with less than a quarter of an equal share


@ordinary_tensors
def cut(
    backbone: nn.Module,
    blocks: int = 4,
    at: Sequence[str] | None = None,
    example: Tensor | None = None,
    single: bool = False,
    counted: str = "blocks",
) -> Cutting:
    """Cut a copy of a backbone into blocks of about equal MACs.

    Args:
        backbone: a timm model, or a `described` network; it is not changed.
        blocks: number of blocks; ignored if `at` is given.
        at: names of the first modules of the second and later blocks, in order.
        example: an input (N, C, H, W) with which MACs are counted; by default made from the backbone's configuration.
        single: cut only where a single tensor of features crosses, possibly with other values; takes an example of
            at least two images.
        counted: the caller's name of `blocks`, for messages.

    Raises:
        ValueError: `blocks` is not an integer of at least 1.
        CutError: not a timm model, too few places to cut, an unknown name in `at`, classes without classifier, or
            a forward pass that fails to trace.
    """
    checked_integer(counted, blocks, 1)
    if isinstance(at, str):
        raise CutError(f"at must be a list of names of modules, got {at!r}: give at=[{at!r}].")
    classifiers = classifier_names(backbone)
    backbone = copy.deepcopy(backbone)
    if any(parameter.is_meta for parameter in backbone.parameters()):
        backbone.to("meta")  # buffers too: a forward pass needs all tensors on one device
    shared = _unshare(backbone)
    example = example_input(backbone, 2 if single else 1) if example is None else example
    with evaluating(backbone):
        # Cuts are always made by name, so that a saved model is cut in the same way.
        names = _balanced(backbone, classifiers, blocks, example, single, counted) if at is None else at
        trace, positions = _traced_for(backbone, classifiers, names, example)
        cutting, called_again = _unshare_blocks(trace.split(positions))
        _verify(cutting, backbone, example)
    if shared or called_again:
        _warn_about_sharing(backbone, shared + called_again)
    return cutting


@ordinary_tensors
def next_cut(backbone: nn.Module, at: Sequence[str], example: Tensor | None = None) -> str:
    """Where to cut the last block once more: the module that divides its MACs most evenly.

    Args:
        backbone: as for `cut`; it is not changed.
        at: the cuts so far.
        example: as for `cut`.

    Returns:
        The name of a module: `cut(backbone, at=[*at, name])` has one more block.

    Raises:
        CutError: the last block has no place to cut.
    """
    backbone = copy.deepcopy(backbone)
    example = example_input(backbone) if example is None else example
    classifiers = classifier_names(backbone)
    opened, closed = ancestors([*at, *classifiers]), set[str]()
    with evaluating(backbone):
        trace, everywhere = _measured(backbone, opened, classifiers, example)
        while True:
            candidates = _within_last(trace, everywhere, at)
            best = _best_cuts(candidates, 2)
            start = trace.position(at[-1]) if at else 0
            inside = {node.target for node in trace.nodes[start:] if node.op == "call_module"}
            heavy = {name: macs for name, macs in trace.openable(closed).items() if name in inside}
            if not heavy or (best is not None and best[1] <= _UNEVEN / 2):
                break
            name = next(iter(heavy))
            try:
                trace, everywhere = _measured(backbone, opened | {name}, classifiers, example)
                opened.add(name)
            except CutError:
                closed.add(name)
    if best is None:
        raise CutError(f"the last block of this {type(backbone).__name__} has no place left to cut.")
    return candidates[best[0][0]][1].name


def _within_last(
    trace: CoarseTrace, candidates: list[tuple[int, CutPoint]], at: Sequence[str]
) -> list[tuple[int, CutPoint]]:
    """The candidates inside the last block, with the share of that block's MACs before each."""
    start = trace.position(at[-1]) if at else 0
    total = sum(trace.macs)
    before = sum(trace.macs[:start]) / total
    return [
        (position, replace(point, macs_before=(point.macs_before - before) / (1 - before)))
        for position, point in candidates
        if position > start and before < point.macs_before
    ]


@ordinary_tensors
def cut_points(
    backbone: nn.Module,
    example: Tensor | None = None,
    *,
    classifier: str | None = None,
    input_size: Sequence[int] | None = None,
) -> list[CutPoint]:
    """The places where a backbone can be cut without opening modules, with the share of MACs before each.

    Args:
        backbone: as for `cut`; it is not changed.
        example: as for `cut`.
        classifier: as for `hierens.hierensify`.
        input_size: likewise.

    Examples:
        >>> import timm
        >>> [point.name for point in cut_points(timm.create_model("resnet10t")) if point.stage_end]
        ['layer1', 'layer2', 'layer3', 'layer4']
    """
    backbone = copy.deepcopy(described(backbone, classifier, input_size))
    example = example_input(backbone) if example is None else example
    classifiers = classifier_names(backbone)
    with evaluating(backbone):
        trace = CoarseTrace(backbone, ancestors(classifiers), classifiers)
        return [point for _, point in trace.candidates(example)]


def _traced_for(
    backbone: nn.Module, classifiers: tuple[str, ...], at: Sequence[str], example: Tensor
) -> tuple[CoarseTrace, list[int]]:
    """A trace that can be cut at the named modules, and their positions; no list crosses a cut if it can be opened."""
    opened = ancestors([*at, *classifiers])
    trace, _ = _measured(backbone, opened, classifiers, example)
    while True:
        positions = [trace.position(name) for name in at]
        crossing = {str(node.target) for position in positions for node in trace.crossing(position)}
        makers = crossing & trace.list_makers - opened
        if not makers:
            return trace, positions
        try:
            trace, _ = _measured(backbone, opened | makers, classifiers, example)
        except CutError:
            return trace, positions
        opened |= makers


def _measured(
    backbone: nn.Module, opened: set[str], classifiers: tuple[str, ...], example: Tensor
) -> tuple[CoarseTrace, list[tuple[int, CutPoint]]]:
    """A trace that runs, and its candidates; opens modules that return lists if other modules cannot read these."""
    opened = set(opened)
    while True:
        trace = CoarseTrace(backbone, opened, classifiers)
        try:
            return trace, trace.candidates(example)
        except CutError:
            makers = trace.list_makers - opened
            if not makers:
                raise
            opened |= makers


def _balanced(
    backbone: nn.Module, classifiers: tuple[str, ...], blocks: int, example: Tensor, single: bool, counted: str
) -> list[str]:
    """The best cuts by name; modules are opened, the most expensive first, until no block has too many MACs."""
    opened, closed = ancestors(classifiers), set[str]()
    trace, candidates = _measured(backbone, opened, classifiers, example)
    while True:
        if single:
            candidates = [(at, point) for at, point in candidates if point.features == 1]
        best = _best_cuts(candidates, blocks)
        heavy = trace.openable(closed)
        if not heavy or (best is not None and best[1] <= max(_UNEVEN / blocks, 1.1 * trace.indivisible(heavy))):
            break
        try:
            # To trace less often, modules of similar cost are opened together, or all if there are too few places.
            least = max(heavy.values()) / 2 if best is not None else 0
            names = [name for name, macs in heavy.items() if macs >= least]
            trace, candidates = _measured(backbone, opened | set(names), classifiers, example)
            opened |= set(names)
        except CutError:
            closed |= set(names)
    if best is None:
        raise CutError(
            f"{counted}={blocks} is more than this {type(backbone).__name__} can be cut into: "
            f"{len(candidates) + 1} at most."
        )
    return [candidates[index][1].name for index in best[0]]


def _best_cuts(candidates: list[tuple[int, CutPoint]], blocks: int) -> tuple[list[int], float] | None:
    """The cuts with the smallest sum of squared shares plus penalties, and the largest share of a block."""
    before = [0.0] + [point.macs_before for _, point in candidates] + [1.0]
    penalty = [0.0] + [
        _OFF_STAGE * (not point.stage_end) + _SEVERAL * (point.crossing > 1) + _OTHER * (not point.tensors_only)
        for _, point in candidates
    ]
    if len(candidates) + 1 < blocks:
        return None

    def block_cost(share: float) -> float:
        return share**2 + _TINY * (share < 0.25 / blocks)

    # cheapest[j]: the cheapest cuts of which the last is at place j, as (cost, places of the cuts)
    cheapest: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(blocks - 1):
        cheapest = {
            place: min(
                (cost + block_cost(before[place] - before[last]) + penalty[place], (*cuts, place))
                for last, (cost, cuts) in cheapest.items()
                if last < place
            )
            for place in range(1, len(candidates) + 1)
            if any(last < place for last in cheapest)
        }
    _, cuts = min((cost + block_cost(1 - before[last]), cuts) for last, (cost, cuts) in cheapest.items())
    edges = [0, *cuts, len(before) - 1]
    largest = max(before[right] - before[left] for left, right in pairwise(edges))
    return [place - 1 for place in cuts], largest


def _unshare(backbone: nn.Module) -> list[str]:
    """Replace layers that occur several times in a backbone by copies, from the second occurrence on; their names."""
    seen: set[nn.Module] = set()
    shared: list[str] = []

    def visit(owner: nn.Module, path: str) -> None:
        for name, module in owner._modules.items():
            if module is None or next(module.parameters(), None) is None:
                continue
            if module in seen:
                shared.append(f"{path}{name}")
                module = owner._modules[name] = copy.deepcopy(module)
            seen.add(module)
            visit(module, f"{path}{name}.")

    visit(backbone, "")
    return shared


def _unshare_blocks(cutting: Cutting) -> tuple[Cutting, list[str]]:
    """Replace blocks that share layers with earlier blocks by copies; the names of these layers."""
    seen: set[int] = set()
    blocks, shared = [], []
    for block in cutting.blocks:
        own = {id(parameter): name for name, parameter in block.named_parameters()}
        again = [name for parameter, name in own.items() if parameter in seen]
        blocks.append(copy.deepcopy(block) if again else block)
        shared += again
        seen |= own.keys()
    return replace(cutting, blocks=tuple(blocks)), shared


def _warn_about_sharing(backbone: nn.Module, shared: Sequence[str]) -> None:
    some = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
    warnings.warn(
        f"this {type(backbone).__name__} uses layers in more than one place ({some}): in a tree they become separate "
        "layers with equal weights, which training makes different.",
        stacklevel=4,
    )


def _verify(cutting: Cutting, backbone: nn.Module, example: Tensor) -> None:
    """Raise a CutError unless the composition of the parts equals the backbone on an example."""
    with torch.no_grad():
        expected, value = backbone(example), example
        for piece in (*cutting.blocks, cutting.head, cutting.classifier):
            value = piece(*value) if isinstance(value, tuple) else piece(value)
    if value.is_meta:
        return  # no values to compare
    if not torch.allclose(value, expected, rtol=1e-5, atol=1e-6):
        raise CutError(
            f"the blocks of this {type(backbone).__name__} do not reproduce it (outputs differ by "
            f"{(value - expected).abs().max():.1e}): its forward pass does something that a trace does not record."
        )
