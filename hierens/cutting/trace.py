"""A coarse trace of a backbone: its modules in call order, their costs, and the values that cross each place.

`hierens.cutting.cut` chooses where to cut it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from hierens.core.errors import first_line
from hierens.core.macs import MacCounter
from hierens.cutting.block import Block
from hierens.cutting.fx_tracer import CutError, ancestors, coarse_graph, dropouts_as_modules, features_end
from hierens.cutting.stages import Stage, find_stages


@dataclass(frozen=True)
class CutPoint:
    """A place where the backbone can be cut: before the module `name`.

    Attributes:
        name: the first module of the next block, as in `backbone.named_modules()`; a value for `at=`.
        macs_before: share of the backbone's multiply-accumulates before it, from 0 to 1.
        stage_end: whether a sequence of sibling modules ends here.
        crossing: number of values that cross the cut.
        tensors_only: whether all of them are tensors.
        features: number of them that are features, with an entry per image.
    """

    name: str
    macs_before: float
    stage_end: bool
    crossing: int
    tensors_only: bool = True
    features: int = 1


@dataclass(frozen=True)
class Cutting:
    """A backbone divided into parts: `classifier(head(blocks[-1](... blocks[0](x))))` equals `backbone(x)`.

    Attributes:
        blocks: the B + 1 blocks of the tree, up to the backbone's `forward_features`.
        head: from there to the classifier, such as pooling.
        classifier: the last linear layer (or layers, for a backbone with several heads) and all operations after it;
            empty for a backbone without classifier.
        at: names of the first modules of the second and later blocks.
        classifier_names: names of the last linear layers, in `classifier` and in the backbone.
        stages: the stages that end in the blocks; none if the backbone returns no such maps.
    """

    blocks: tuple[fx.GraphModule, ...]
    head: fx.GraphModule
    classifier: fx.GraphModule
    at: tuple[str, ...]
    classifier_names: tuple[str, ...]
    stages: tuple[Stage, ...] = ()

    @property
    def parts(self) -> tuple[fx.GraphModule, ...]:
        """The blocks, the head and the classifier."""
        return (*self.blocks, self.head, self.classifier)


class CoarseTrace:
    """A coarse trace of a backbone.

    Attributes:
        nodes: in call order.
        classifier_start: position of the first node of the classifier; the end, if there is none.
        features_end: position of the first node after `forward_features`.
        macs: multiply-accumulates of each node; set by `candidates`, as all that follow.
        tensors: the nodes whose value is a tensor.
        features: the nodes whose value is a tensor of features, with an entry per image.
        list_makers: modules that return something other than a tensor.
    """

    def __init__(self, backbone: nn.Module, opened: set[str], classifiers: tuple[str, ...]) -> None:
        graph = coarse_graph(backbone, opened)
        self.backbone, self.classifier_names, self.opened = backbone, classifiers, opened
        self.persistent = set(backbone.state_dict())
        self.extra = dropouts_as_modules(graph, set(dict(backbone.named_modules())))
        features = [node for node in graph.nodes if node.target is features_end]
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
        self.classifier_start = min((self.position(name) for name in classifiers), default=len(self.nodes))
        self.features_end = min(self.index.get(marker, self.classifier_start), self.classifier_start)
        self.macs: list[int] = []
        self.tensors: set[fx.Node] = set()
        self.features: set[fx.Node] = set()
        self.list_makers: set[str] = set()

    def position(self, name: str) -> int:
        """Index of the first node that calls the module `name` or a module inside it."""
        inside = [i for called, i in self.first_call.items() if called == name or called.startswith(f"{name}.")]
        if not inside:
            known = ", ".join(list(self.first_call)[:12])
            raise CutError(f"the backbone calls no module named {name!r}; it calls, among others: {known}")
        return min(inside)

    def name(self, position: int) -> str:
        """The outermost module whose first call is at a position: `layer2` rather than `layer2.0.conv1`."""
        target = str(self.nodes[position].target)
        return next(name for name in (*sorted(ancestors([target])), target) if self.position(name) == position)

    def module(self, name: str) -> nn.Module:
        """A module that the trace calls, by its name."""
        return self.extra[name] if name in self.extra else self.backbone.get_submodule(name)

    def openable(self, closed: set[str]) -> dict[str, int]:
        """The modules that could be opened, with their MACs, the largest first."""
        weights: dict[str, int] = {}
        for node, macs in zip(self.nodes, self.macs, strict=True):
            if node.op == "call_module" and macs and node.target not in closed:
                weights[node.target] = weights.get(node.target, 0) + macs
        names = sorted(weights, key=lambda name: -weights[name])
        return {name: weights[name] for name in names if next(self.module(name).children(), None) is not None}

    def indivisible(self, openable: Container[str]) -> float:
        """The largest share of the MACs in one layer that cannot be opened, a lower bound for the largest block."""
        own = [macs for node, macs in zip(self.nodes, self.macs, strict=True) if node.target not in openable]
        return max(own, default=0) / max(sum(self.macs), 1)

    def crossing(self, position: int) -> list[fx.Node]:
        """The values computed before a position and used at or after it."""
        return [node for node, last in zip(self.nodes[:position], self.last_use, strict=False) if last >= position]

    def candidates(self, example: Tensor) -> list[tuple[int, CutPoint]]:
        """The places where the features can be cut, with their positions.

        These are the first calls of modules, except where a crossing value is later changed in place.

        Raises:
            CutError: the trace does not run.
        """
        positions = [
            position
            for position in self.first_call.values()
            if 0 < position < self.features_end
            and self.nodes[0] not in self.crossing(position)
            and not self._completes_a_layer(position)
        ]
        measurement = _Measurement(self, positions)
        self.macs, self.tensors, self.list_makers = measurement.macs, measurement.tensors, measurement.list_makers
        self.features = measurement.features
        try:
            measurement.measure(example)
        except Exception as error:  # an opened module has control flow that depends on the type of a value
            raise CutError(f"{type(self.backbone).__name__} does not run as traced: {first_line(error)}") from error
        total = max(sum(self.macs), 1)
        found = []
        for position in positions:
            before = sum(self.macs[:position])
            if 0 < before < total and position not in measurement.mutated:
                crossing = self.crossing(position)
                plain = all(node in self.tensors for node in crossing)
                features = sum(node in self.features for node in crossing)
                name, stage_end = self.name(position), self._stage_end(position)
                point = CutPoint(name, before / total, stage_end, len(crossing), plain, features)
                found.append((position, point))
        return found

    def _completes_a_layer(self, position: int) -> bool:
        """Whether the node is a norm or activation that directly follows its convolution or linear layer."""
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
        """Cut at these positions.

        Raises:
            CutError: positions that are not in order, or outside the features.
        """
        if sorted(set(cuts)) != list(cuts):
            raise CutError(
                "the modules in `at` must be in the order in which the backbone calls them, without repetition."
            )
        if cuts and not 0 < cuts[0] <= cuts[-1] < self.features_end:
            raise CutError("every module in `at` must come after the backbone's first module and before its head.")
        edges = [1, *cuts, self.features_end, self.classifier_start, len(self.nodes)]
        pieces = [self._piece(start, end) for start, end in pairwise(edges)]
        names = tuple(self.name(position) for position in cuts)
        *blocks, head, classifier = pieces
        features = {node: self.index[node] for node in self.features}
        stages = find_stages(self.backbone, self.opened, features, edges[:-2])
        return Cutting(tuple(blocks), head, classifier, names, self.classifier_names, stages)

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
            single = len(values) == 1 and self.crossing(end)[0] in self.tensors
            graph.output(values[0] if single else values)
        parts: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                parts[node.target] = self.module(node.target)
            elif node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                parts[node.target] = getattr(self.backbone.get_submodule(owner), name)
        piece = Block(parts, graph, class_name="Block")
        for target, value in parts.items():
            if isinstance(value, Tensor) and target not in self.persistent:
                owner, _, name = target.rpartition(".")
                piece.get_submodule(owner)._non_persistent_buffers_set.add(name)
        piece.train(self.backbone.training)
        return piece


class _Measurement(fx.Interpreter):
    """Runs a trace once.

    It measures each node's MACs, and finds the cuts at which a crossing tensor is later changed in place (`mutated`).
    """

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
        self.versions: list[tuple[int, Tensor, int]] = []
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
        self.mutated = {position for position, tensor, version in self.versions if tensor._version != version}

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
                self.versions.append((self.position[n], value, value._version))
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
    """Replace fx's immutable lists by plain ones, since some modules write into them."""
    if isinstance(value, (tuple, list)):
        made = [_with_lists(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    return {key: _with_lists(item) for key, item in value.items()} if isinstance(value, dict) else value
