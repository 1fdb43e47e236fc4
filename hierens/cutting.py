"""From a backbone to blocks in sequence, and the proof that they compose to the backbone.

The backbone is traced coarsely with `torch.fx`: every module stays whole but the root, plain `Sequential`s and those
that must be opened so that no block holds too much of the work (the heaviest is opened first). Because the backbone's
own modules stay leaves of the trace, their names, training flags and inner control flow survive, and one trace serves
training and evaluation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from hierens.errors import first_line
from hierens.modes import evaluating, frozen

_UNEVEN = 1.6  # a block may hold this multiple of an equal share of the MACs before leaves are opened
_OFF_STAGE = 0.02  # added to the sum of squared shares for a cut within a stage
_SEVERAL = 0.1  # for one that several tensors cross
_OTHER = 1.0  # and for one that anything else crosses, such as sizes: taken only when nothing else is left


class CutError(ValueError):
    """The backbone cannot be cut as asked."""


@dataclass(frozen=True)
class CutPoint:
    """A place where the backbone can be cut: just before the module `name`.

    Attributes:
        name: the module that would begin a block, as in `backbone.named_modules()`; what `at=` takes.
        macs_before: share of the backbone's multiply-accumulates that lies before it, from 0 to 1.
        stage_end: whether one run of sibling modules ends here.
        crossing: how many values cross.
        tensors_only: whether all of them are tensors.
    """

    name: str
    macs_before: float
    stage_end: bool
    crossing: int
    tensors_only: bool = True


@dataclass(frozen=True)
class Cutting:
    """A backbone in pieces: `classifier(head(blocks[-1](... blocks[0](x))))` equals `backbone(x)`.

    Attributes:
        blocks: the B + 1 blocks of the tree, up to the backbone's `forward_features`.
        head: from there to the classifier: pooling and what else precedes it.
        classifier: the last linear layer (or layers, for a backbone with several heads) and whatever follows.
        at: names of the modules that begin the second and later blocks.
        classifier_names: where the last linear layers lie within their piece and in the backbone.
    """

    blocks: tuple[fx.GraphModule, ...]
    head: fx.GraphModule
    classifier: fx.GraphModule
    at: tuple[str, ...]
    classifier_names: tuple[str, ...]


def cut(
    backbone: nn.Module, blocks: int = 4, at: Sequence[str] | None = None, example: Tensor | None = None
) -> Cutting:
    """Cut a copy of a backbone into blocks of about equal work.

    Args:
        backbone: a timm classification model; it is left as it is.
        blocks: how many blocks; ignored when `at` is given.
        at: names of modules that shall begin the second and later blocks, in order.
        example: an input (N, C, H, W) to weigh the layers with; by default made from the backbone's configuration.

    Raises:
        CutError: too few places to cut, an unknown name in `at`, no classifier, or a forward pass that
            cannot be traced.
    """
    if blocks < 1:
        raise CutError(f"blocks must be at least 1, got {blocks}.")
    backbone = copy.deepcopy(backbone)
    example = example_input(backbone) if example is None else example
    classifiers = classifier_names(backbone)
    with evaluating(backbone):
        if at is None:
            trace, chosen = _balanced(backbone, classifiers, blocks, example)
        else:
            trace = _Trace(backbone, _ancestors([*at, *classifiers]), classifiers)
            trace.candidates(example)  # tells which values are tensors
            chosen = [trace.position(name) for name in at]
        cutting = trace.split(chosen)
        _prove(cutting, backbone, example)
    return cutting


def next_cut(backbone: nn.Module, at: Sequence[str], example: Tensor | None = None) -> str:
    """Where to cut the last of the blocks once more: the module that halves its work best.

    Args:
        backbone: as for `cut`; it is left as it is.
        at: the cuts so far.
        example: as for `cut`.

    Returns:
        A module's name: `cut(backbone, at=[*at, name])` has one block more.

    Raises:
        CutError: the last block has no place to cut.
    """
    backbone = copy.deepcopy(backbone)
    example = example_input(backbone) if example is None else example
    classifiers = classifier_names(backbone)
    opened, closed = _ancestors([*at, *classifiers]), set[str]()
    with evaluating(backbone):
        trace = _Trace(backbone, opened, classifiers)
        while True:
            candidates = _within_last(trace, at, example)
            best = _best_cuts(candidates, 2)
            start = trace.position(at[-1]) if at else 0
            inside = {node.target for node in trace.nodes[start:] if node.op == "call_module"}
            heavy = {name: macs for name, macs in trace.openable(closed).items() if name in inside}
            if not heavy or (best is not None and best[1] <= _UNEVEN / 2):
                break
            name = next(iter(heavy))
            try:
                trace = _Trace(backbone, opened | {name}, classifiers)
                opened.add(name)
            except CutError:
                closed.add(name)
    if best is None:
        raise CutError(f"the last block of this {type(backbone).__name__} has no place left to cut.")
    return candidates[best[0][0]][1].name


def _within_last(trace: _Trace, at: Sequence[str], example: Tensor) -> list[tuple[int, CutPoint]]:
    """The candidates inside the last block, with the share of that block's work that lies before each."""
    candidates, start = trace.candidates(example), trace.position(at[-1]) if at else 0
    total = sum(trace.macs)
    spent = sum(trace.macs[:start]) / total
    return [
        (position, replace(point, macs_before=(point.macs_before - spent) / (1 - spent)))
        for position, point in candidates
        if position > start and spent < point.macs_before
    ]


def cut_points(backbone: nn.Module, example: Tensor | None = None) -> list[CutPoint]:
    """The places where a backbone can be cut without opening its blocks, with the work that lies before each.

    Examples:
        >>> import timm
        >>> [point.name for point in cut_points(timm.create_model("resnet10t")) if point.stage_end]
        ['layer1', 'layer2', 'layer3', 'layer4']
    """
    backbone = copy.deepcopy(backbone)
    example = example_input(backbone) if example is None else example
    classifiers = classifier_names(backbone)
    with evaluating(backbone):
        trace = _Trace(backbone, _ancestors(classifiers), classifiers)
        return [point for _, point in trace.candidates(example)]


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a timm model was made for, its own `in_chans` first."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    traits = getattr(model, "_traits", None) or {}
    if traits.get("img_size"):
        size = (size[0], *traits["img_size"])
    if first_conv := cfg.get("first_conv"):
        name = first_conv if isinstance(first_conv, str) else first_conv[0]
        size = (model.get_parameter(f"{name}.weight").shape[1], *size[1:])
    return (int(getattr(model, "in_chans", size[0])), int(size[1]), int(size[2]))


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """A seeded random batch (N, C, H, W) of the size that a timm model was made for."""
    parameter = next(model.parameters(), torch.empty(0))
    values = torch.randn(batch, *input_size(model), generator=torch.Generator().manual_seed(0))
    return values.to(parameter.device, parameter.dtype)


def _balanced(
    backbone: nn.Module, classifiers: tuple[str, ...], blocks: int, example: Tensor
) -> tuple[_Trace, list[int]]:
    """Open the heaviest leaves until the best cuts leave no block with too much of the work."""
    opened, closed = _ancestors(classifiers), set[str]()
    trace = _Trace(backbone, opened, classifiers)
    while True:
        candidates = trace.candidates(example)
        best = _best_cuts(candidates, blocks)
        heavy = trace.openable(closed)
        if not heavy or (best is not None and best[1] <= max(_UNEVEN / blocks, 1.1 * trace.indivisible(heavy))):
            break
        try:
            # A trace each would take long: leaves of like weight are opened together, all when places are short.
            least = max(heavy.values()) / 2 if best is not None else 0
            names = [name for name, macs in heavy.items() if macs >= least]
            trace = _Trace(backbone, opened | set(names), classifiers)
            opened |= set(names)
        except CutError:
            closed |= set(names)
    if best is None:
        raise CutError(
            f"blocks={blocks} is more than this {type(backbone).__name__} can be cut into: "
            f"{len(candidates) + 1} at most."
        )
    return trace, [candidates[index][0] for index in best[0]]


def _best_cuts(candidates: list[tuple[int, CutPoint]], blocks: int) -> tuple[list[int], float] | None:
    """The cuts with the smallest sum of squared shares plus penalties, and the largest share they leave."""
    before = [0.0] + [point.macs_before for _, point in candidates] + [1.0]
    penalty = [0.0] + [
        _OFF_STAGE * (not point.stage_end) + _SEVERAL * (point.crossing > 1) + _OTHER * (not point.tensors_only)
        for _, point in candidates
    ]
    if len(candidates) + 1 < blocks:
        return None
    # cheapest[j]: the best way to end a block at place j, as (cost, places of the cuts so far)
    cheapest: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(blocks - 1):
        cheapest = {
            place: min(
                (cost + (before[place] - before[last]) ** 2 + penalty[place], (*cuts, place))
                for last, (cost, cuts) in cheapest.items()
                if last < place
            )
            for place in range(1, len(candidates) + 1)
            if any(last < place for last in cheapest)
        }
    _, cuts = min((cost + (1 - before[last]) ** 2, cuts) for last, (cost, cuts) in cheapest.items())
    edges = [0, *cuts, len(before) - 1]
    largest = max(before[right] - before[left] for left, right in pairwise(edges))
    return [place - 1 for place in cuts], largest


class _CoarseTracer(fx.Tracer):
    """Keeps every module whole but plain Sequentials and those named; calls the root with its first argument only."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.opened = opened
        self.looked_into: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened and type(m).forward is not nn.Sequential.forward

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        first = list(inspect.signature(root_fn).parameters)[1]
        return lambda root, x: root_fn(root, x), [self.root, self.create_proxy("placeholder", first, (), {})]

    def iter(self, obj: fx.Proxy) -> Any:
        self._look_into(obj.node)
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self._look_into(obj.node)
        return super().to_bool(obj)

    def _look_into(self, node: fx.Node) -> None:
        """Note the modules nearest to a value that is asked for its length or truth."""
        if node.op == "call_module":
            self.looked_into.add(str(node.target))
        for earlier in node.all_input_nodes if node.op != "call_module" else ():
            self._look_into(earlier)


def _features_end() -> None:
    """Marks, while tracing, where the backbone's `forward_features` returns."""


@contextmanager
def _marked_features(backbone: nn.Module, tracer: fx.Tracer) -> Iterator[None]:
    original: Callable[..., Any] = backbone.forward_features  # type: ignore[assignment]

    def marked(*args: Any, **kwargs: Any) -> Any:
        features = original(*args, **kwargs)
        tracer.create_proxy("call_function", _features_end, (), {})
        return features

    backbone.__dict__["forward_features"] = marked
    try:
        yield
    finally:
        del backbone.__dict__["forward_features"]


def _traced(backbone: nn.Module, opened: set[str]) -> fx.Graph:
    """A coarse trace. Where the backbone looks into what a module returns, that module is opened as well.

    Raises:
        CutError: the backbone's own control flow depends on values.
    """
    opened = set(opened)
    while True:
        tracer = _CoarseTracer(opened)
        try:
            with _marked_features(backbone, tracer):
                return tracer.trace(backbone)
        except Exception as error:
            more = tracer.looked_into - opened
            if not more:
                raise CutError(f"{type(backbone).__name__} cannot be traced: {first_line(error)}") from error
            opened |= more


class _Trace:
    """A coarse trace of a backbone: its nodes in order, where its features end and where its classifier begins."""

    def __init__(self, backbone: nn.Module, opened: set[str], classifiers: tuple[str, ...]) -> None:
        graph = _traced(backbone, opened)
        self.backbone, self.classifier_names = backbone, classifiers
        self.extra = _dropouts_as_modules(graph, set(dict(backbone.named_modules())))
        features = [node for node in graph.nodes if node.target is _features_end]
        marker = features[0].next if len(features) == 1 else None
        for node in features:
            graph.erase_node(node)
        *self.nodes, self.output = graph.nodes
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.last_use = [
            max((self.index.get(user, len(self.nodes)) for user in node.users), default=-1) for node in self.nodes
        ]
        self.first_call: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            if node.op == "call_module":
                self.first_call.setdefault(node.target, index)
        self.classifier_start = min(self.position(name) for name in classifiers)
        self.features_end = min(self.index.get(marker, self.classifier_start), self.classifier_start)
        self.macs: list[int] = []
        self.tensors: set[fx.Node] = set()

    def position(self, name: str) -> int:
        """Index of the first node that calls the module `name` or one inside it."""
        inside = [i for called, i in self.first_call.items() if called == name or called.startswith(f"{name}.")]
        if not inside:
            known = ", ".join(list(self.first_call)[:12])
            raise CutError(f"the backbone calls no module named {name!r}; among those it calls: {known}, ...")
        return min(inside)

    def name(self, position: int) -> str:
        """The outermost module that begins at a position: `layer2` rather than `layer2.0.conv1`."""
        target = str(self.nodes[position].target)
        return next(name for name in (*sorted(_ancestors([target])), target) if self.position(name) == position)

    def module(self, name: str) -> nn.Module:
        return self.extra[name] if name in self.extra else self.backbone.get_submodule(name)

    def openable(self, closed: set[str]) -> dict[str, int]:
        """Leaves with modules inside and the MACs of each, heaviest first."""
        weights: dict[str, int] = {}
        for node, macs in zip(self.nodes, self.macs, strict=True):
            if node.op == "call_module" and macs and node.target not in closed:
                weights[node.target] = weights.get(node.target, 0) + macs
        names = sorted(weights, key=lambda name: -weights[name])
        return {name: weights[name] for name in names if next(self.module(name).children(), None) is not None}

    def indivisible(self, openable: Container[str]) -> float:
        """The largest share of the MACs that one layer holds: no cut makes the largest block smaller than that."""
        own = [macs for node, macs in zip(self.nodes, self.macs, strict=True) if node.target not in openable]
        return max(own, default=0) / max(sum(self.macs), 1)

    def crossing(self, position: int) -> list[fx.Node]:
        """The values made before a position and used at or after it."""
        return [node for node, last in zip(self.nodes[:position], self.last_use, strict=False) if last >= position]

    def candidates(self, example: Tensor) -> list[tuple[int, CutPoint]]:
        """Where the features can be cut: before a module's first call, but for what is changed in place later."""
        positions = [
            position
            for position in self.first_call.values()
            if 0 < position < self.features_end
            and self.nodes[0] not in self.crossing(position)
            and not self._completes_a_layer(position)
        ]
        weigher = _Weigher(self, positions)
        weigher.measure(example)
        self.macs, self.tensors = weigher.macs, weigher.tensors
        total = max(sum(self.macs), 1)
        found = []
        for position in positions:
            before = sum(self.macs[:position])
            if 0 < before < total and position not in weigher.mutated:
                crossing = self.crossing(position)
                plain = all(node in self.tensors for node in crossing)
                point = CutPoint(self.name(position), before / total, self._stage_end(position), len(crossing), plain)
                found.append((position, point))
        return found

    def _completes_a_layer(self, position: int) -> bool:
        """Whether a norm or activation follows the bare convolution or linear layer that it belongs to."""
        node, previous = self.nodes[position], self.nodes[position - 1]
        if previous.op != "call_module" or previous not in node.all_input_nodes:
            return False
        here, before = self.module(node.target), self.module(previous.target)
        weights = [parameter.ndim for parameter in before.parameters(recurse=False)]
        return max(weights, default=0) > 1 and not any(p.ndim > 1 for p in here.parameters())

    def _stage_end(self, position: int) -> bool:
        previous = [node.target for node in self.nodes[:position] if node.op == "call_module"]
        return previous[-1].rpartition(".")[0] != self.nodes[position].target.rpartition(".")[0]

    def split(self, cuts: Sequence[int]) -> Cutting:
        """Cut at positions in the list of nodes."""
        if sorted(set(cuts)) != list(cuts):
            raise CutError(
                "the modules in `at` must be given in the order in which the backbone calls them, once each."
            )
        if cuts and not 0 < cuts[0] <= cuts[-1] < self.features_end:
            raise CutError("every module in `at` must lie after the backbone's first and before its head.")
        edges = [1, *cuts, self.features_end, self.classifier_start, len(self.nodes)]
        pieces = [self._piece(start, end) for start, end in pairwise(edges)]
        names = tuple(self.name(position) for position in cuts)
        *blocks, head, classifier = pieces
        return Cutting(tuple(blocks), head, classifier, names, self.classifier_names)

    def _piece(self, start: int, end: int) -> fx.GraphModule:
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.crossing(start):
            made[node] = graph.placeholder(node.name)
        for node in self.nodes[start:end]:
            made[node] = graph.node_copy(node, lambda old: made[old])
        if end == len(self.nodes):
            graph.output(fx.map_arg(self.output.args[0], lambda old: made[old]))
        else:
            values = tuple(made[node] for node in self.crossing(end))
            alone = len(values) == 1 and self.crossing(end)[0] in self.tensors
            graph.output(values[0] if alone else values)
        parts: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                parts[node.target] = self.module(node.target)
            elif node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                parts[node.target] = getattr(self.backbone.get_submodule(owner), name)
        piece = fx.GraphModule(parts, graph, class_name="Block")
        piece.train(self.backbone.training)
        return piece


class _Weigher(fx.Interpreter):
    """Runs a trace once, noting each node's MACs and which crossing tensors a later node changes in place."""

    def __init__(self, trace: _Trace, positions: Sequence[int]) -> None:
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in trace.nodes:
            made[node] = graph.node_copy(node, lambda old: made[old])
        graph.output(made[trace.nodes[-1]])
        root = nn.Module()
        super().__init__(fx.GraphModule(root, fx.Graph()), garbage_collect_values=False, graph=graph)
        self.trace, self.made = trace, made
        self.watch = {made[trace.nodes[p]]: [made[n] for n in trace.crossing(p)] for p in positions}
        self.position = {made[trace.nodes[p]]: p for p in positions}
        self.seen: list[tuple[int, Tensor, int]] = []
        self.macs: list[int] = []
        self.mutated: set[int] = set()
        self.tensors: set[fx.Node] = set()
        self.original = {copied: node for node, copied in made.items()}

    def measure(self, example: Tensor) -> None:
        with torch.no_grad(), frozen(self.trace.backbone), FlopCounterMode(display=False) as self.counter:
            self.run(example)
        self.mutated = {position for position, tensor, version in self.seen if tensor._version != version}

    def fetch_attr(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self.trace.backbone.get_submodule(owner), name)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _with_lists((args, kwargs))
        return self.trace.module(target)(*args, **kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _with_lists((args, kwargs))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        for crossing in self.watch.get(n, ()):
            value = self.env[crossing]
            if isinstance(value, Tensor):
                self.seen.append((self.position[n], value, value._version))
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        if n.op != "output":
            self.macs.append((self.counter.get_total_flops() - before) // 2)
            if isinstance(result, Tensor):
                self.tensors.add(self.original[n])
        return result


def _with_lists(value: Any) -> Any:
    """Plain lists for fx's immutable ones, into which some modules could not write."""
    if isinstance(value, (tuple, list)):
        made = [_with_lists(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    return {key: _with_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def _dropouts_as_modules(graph: fx.Graph, taken: set[str]) -> dict[str, nn.Module]:
    """Functional dropout was traced with `training=False` baked in: a module keeps following the model's mode."""
    made: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.dropout:
            name = next(n for i in range(99) if (n := f"dropout{i or ''}") not in taken | made.keys())
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            made[name] = nn.Dropout(p)
            with graph.inserting_before(node):
                module = graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(module)
            graph.erase_node(node)
    return made


def _ancestors(names: Sequence[str]) -> set[str]:
    """Every module that holds one of the names: `a.b.c` gives `a` and `a.b`."""
    parts = (name.split(".") for name in names)
    return {".".join(path[:end]) for path in parts for end in range(1, len(path))}


def classifier_names(backbone: nn.Module) -> tuple[str, ...]:
    """The names of the modules that `get_classifier()` returns: one, or two for a distilled backbone."""
    getter: Callable[[], Any] | None = getattr(backbone, "get_classifier", None)
    found = getter() if getter else None
    modules = found if isinstance(found, (tuple, list)) else [found]
    names = [
        next((name for name, own in backbone.named_modules() if own is module), "")
        for module in modules
        if isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
    ]
    if not names or not all(names):
        kind = type(backbone).__name__
        raise CutError(f"this {kind} has no classifier: make it with num_classes of at least 1.")
    return tuple(names)


def _prove(cutting: Cutting, backbone: nn.Module, example: Tensor) -> None:
    """Raise unless the pieces compose to the backbone on an example."""
    with torch.no_grad():
        expected, value = backbone(example), example
        for piece in (*cutting.blocks, cutting.head, cutting.classifier):
            value = piece(*value) if isinstance(value, tuple) else piece(value)
    if value.is_meta:
        return  # there are no values to compare
    if not torch.allclose(value, expected, rtol=1e-5, atol=1e-6):
        raise CutError(
            f"the blocks of this {type(backbone).__name__} do not compose to it "
            f"(outputs differ by {(value - expected).abs().max():.1e}): its forward pass does more than a trace tells."
        )
