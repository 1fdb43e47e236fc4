"""A backbone's forward pass in coarse strokes: which modules it calls in which order, and what lies between.

Every module stays whole but the root, plain `Sequential`s and those that were opened. Because the backbone's own
modules stay leaves of the trace, their names, training flags and inner control flow survive, and one trace serves
training and evaluation. `hierens.cutting.cut` chooses where to cut it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn

from hierens.core.errors import first_line
from hierens.core.macs import MacCounter
from hierens.cutting.graphs import Block


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
        features: how many of them are features, with an entry per image.
    """

    name: str
    macs_before: float
    stage_end: bool
    crossing: int
    tensors_only: bool = True
    features: int = 1


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


class _Proxy(fx.Proxy):
    """Says which module returned it when it is written into, as only a list could be."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.look_into(self.node)  # type: ignore[attr-defined]
        raise TypeError(f"{self.node} is written into, and a trace does not know it for a list")


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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        self.look_into(obj.node)
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.look_into(obj.node)
        return super().to_bool(obj)

    def look_into(self, node: fx.Node) -> None:
        """Note the modules nearest to a value that is asked for its length or truth."""
        waiting, seen = [node], {node}
        while waiting:
            node = waiting.pop()
            if node.op == "call_module":
                self.looked_into.add(str(node.target))
                continue
            new = set(node.all_input_nodes) - seen
            waiting += new
            seen |= new


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


class CoarseTrace:
    """A coarse trace of a backbone: its nodes in order, where its features end and where its classifier begins."""

    def __init__(self, backbone: nn.Module, opened: set[str], classifiers: tuple[str, ...]) -> None:
        graph = _traced(backbone, opened)
        self.backbone, self.classifier_names = backbone, classifiers
        self.saved = set(backbone.state_dict())
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
        self.features: set[fx.Node] = set()
        self.list_makers: set[str] = set()

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
        return next(name for name in (*sorted(ancestors([target])), target) if self.position(name) == position)

    def module(self, name: str) -> nn.Module:
        """A module that the trace calls, by its name."""
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
        self.macs, self.tensors, self.list_makers = weigher.macs, weigher.tensors, weigher.list_makers
        self.features = weigher.features
        try:
            weigher.measure(example)
        except Exception as error:  # a module was opened whose control flow asks for the type of a value
            raise CutError(f"{type(self.backbone).__name__} does not run as traced: {first_line(error)}") from error
        total = max(sum(self.macs), 1)
        found = []
        for position in positions:
            before = sum(self.macs[:position])
            if 0 < before < total and position not in weigher.mutated:
                crossing = self.crossing(position)
                plain = all(node in self.tensors for node in crossing)
                features = sum(node in self.features for node in crossing)
                name, stage_end = self.name(position), self._stage_end(position)
                point = CutPoint(name, before / total, stage_end, len(crossing), plain, features)
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

    def _piece(self, start: int, end: int) -> Block:
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
        piece = Block(parts, graph, class_name="Block")
        for target, value in parts.items():
            if isinstance(value, Tensor) and target not in self.saved:
                owner, _, name = target.rpartition(".")
                piece.get_submodule(owner)._non_persistent_buffers_set.add(name)
        piece.train(self.backbone.training)
        return piece


class _Weigher(fx.Interpreter):
    """Runs a trace once, noting each node's MACs and which crossing tensors a later node changes in place."""

    def __init__(self, trace: CoarseTrace, positions: Sequence[int]) -> None:
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
        self.features: set[fx.Node] = set()
        self.images = 0
        self.list_makers: set[str] = set()
        self.original = {copied: node for node, copied in made.items()}

    def measure(self, example: Tensor) -> None:
        self.images = len(example)
        with torch.no_grad(), MacCounter() as self.counter:
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
                if result.ndim > 1 and len(result) == self.images and result.is_floating_point():
                    self.features.add(self.original[n])
            elif n.op == "call_module":
                self.list_makers.add(str(n.target))
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


def ancestors(names: Sequence[str]) -> set[str]:
    """Every module that holds one of the names: `a.b.c` gives `a` and `a.b`."""
    parts = (name.split(".") for name in names)
    return {".".join(path[:end]) for path in parts for end in range(1, len(path))}
