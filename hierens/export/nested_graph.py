"""Divides an ONNX graph that computes all depths into graphs inside one another, each in an `If` of the one before.

The `If` runs if any image goes on to the next depth. What the next depth reads of the depths around it are the rows of
the images that go on, or, if all go on together, the values themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True)
class FlatGraph:
    """A graph that computes all depths.

    Attributes:
        graph: from images (N, C, H, W), its first input.
        logits: of each depth, (N, classes).
        further: for each depth but the last, which images go on, (N,) of bool; or whether all do, a scalar.
        per_image: which of both.
    """

    graph: ir.Graph
    logits: Sequence[ir.Value]
    further: Sequence[ir.Value]
    per_image: bool

    def needed(self, values: Sequence[ir.Value]) -> Iterator[ir.Node]:
        """The nodes from which values are computed, in order."""
        found: set[ir.Node] = set()
        waiting = [value.producer() for value in values]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found.add(node)
                waiting += [value.producer() for value in node.inputs if value is not None]
        return (node for node in self.graph if node in found)

    def depending_on_images(self) -> set[ir.Value]:
        """All values that are computed from the images, or from their number."""
        found = {self.graph.inputs[0]}
        for node in self.graph:
            if not found.isdisjoint(value for value in node.inputs if value is not None):
                found.update(node.outputs)
        return found

    def has_rows(self, value: ir.Value) -> bool:
        """Whether a value has an entry per image."""
        images = self.graph.inputs[0].shape
        assert images is not None
        return value.shape is not None and value.shape.rank() > 0 and value.shape[0] == images[0]


class _Scope:
    """The graph of one depth while it is written: it sees the values of the scopes around it."""

    def __init__(self, flat: FlatGraph, outer: _Scope | None = None, rows: ir.Value | None = None) -> None:
        """A scope inside another, for some rows of its images, or all."""
        self.flat, self.outer, self.rows = flat, outer, rows
        self.depth: int = outer.depth + 1 if outer else 0
        self.names: Iterator[int] = outer.names if outer else itertools.count()
        self.varying: set[ir.Value] = outer.varying if outer else flat.depending_on_images()
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.values: dict[ir.Value, ir.Value] = {} if outer else {value: _like(value) for value in flat.graph.inputs}
        self._rows_of: dict[_Scope, ir.Value] = {}

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        output = self._named()
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output]))
        return output

    def _named(self) -> ir.Value:
        return ir.Value(name=f"value_{next(self.names)}")  # unique over all scopes, as ONNX requires

    def get(self, value: ir.Value) -> ir.Value:
        """A value of the flat graph, for the images of this scope."""
        if value not in self.values:
            self.values[value] = self._made(value)
        return self.values[value]

    def _made(self, value: ir.Value) -> ir.Value:
        around = self._around(value)
        if around is not None and (self.rows is None or value not in self.varying):
            return around.values[value]
        if around is not None and self.flat.has_rows(value):
            return self.op("Gather", [around.values[value], self._rows_in(around)], axis=0)
        node = value.producer()
        if node is not None and self.rows is not None and self._counts_images(node):
            return self.op("Shape", [self.rows])
        if node is None:
            self.weights.append(_like(value))
            return self.weights[-1]
        inputs = [None if own is None else self.get(own) for own in node.inputs]
        outputs = [self._named() for _ in node.outputs]
        self.nodes.append(ir.Node(node.domain, node.op_type, inputs, node.attributes, outputs=outputs))
        self.values.update(zip(node.outputs, outputs, strict=True))
        return self.values[value]

    def _counts_images(self, node: ir.Node) -> bool:
        """Whether a node only returns the number of images, for which no values need to be gathered."""
        span = [node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes]
        return node.op_type == "Shape" and span == [0, 1] and self.flat.has_rows(node.inputs[0])  # type: ignore[arg-type]

    def _around(self, value: ir.Value) -> _Scope | None:
        """The nearest scope around this one that has a value."""
        scope = self.outer
        while scope is not None and value not in scope.values:
            scope = scope.outer
        return scope

    def _rows_in(self, around: _Scope) -> ir.Value:
        """The rows of this scope's images in a scope around it."""
        assert self.rows is not None and self.outer is not None
        if around is self.outer:
            return self.rows
        if around not in self._rows_of:
            self._rows_of[around] = self.op("Gather", [self.outer._rows_in(around), self.rows])
        return self._rows_of[around]

    def outputs(self) -> list[ir.Value]:
        """Add all that is computed from this depth on; returns the logits and the depth of each image."""
        targets = [self.flat.logits[self.depth], *self.flat.further[self.depth : self.depth + 1]]
        for node in self.flat.needed(targets):
            if self._around(node.outputs[0]) is None:
                self.get(node.outputs[0])
        logits = self.get(targets[0])
        count = self.op("Shape", [logits], start=0, end=1)
        own = [logits, self.op("Expand", [self.op("Constant", [], value_ints=[self.depth]), count])]
        return own if len(targets) == 1 else self._choice(own, self.get(targets[1]))

    def _choice(self, own: list[ir.Value], further: ir.Value) -> list[ir.Value]:
        """An `If` of all depths after this one."""
        rows, condition = None, further
        if self.flat.per_image:
            rows = self.op("Reshape", [self.op("NonZero", [further]), self.op("Constant", [], value_ints=[-1])])
            condition = self.op("Cast", [self.op("Size", [rows])], to=ir.DataType.BOOL)
        inner, stay = _Scope(self.flat, self, rows), _Scope(self.flat, self)
        results = inner.outputs()
        if rows is not None:
            places = inner.op("Unsqueeze", [rows, inner.op("Constant", [], value_ints=[-1])])
            results = [inner.op("ScatterND", [o, places, r]) for o, r in zip(own, results, strict=True)]
        kept = [stay.op("Identity", [value]) for value in own]
        branches = {"then_branch": inner.graph((), results), "else_branch": stay.graph((), kept)}
        outputs = [self._named() for _ in own]
        self.nodes.append(ir.node("If", [condition], branches, outputs=outputs))
        return outputs

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """The finished graph."""
        logits, batch = self.flat.logits[0], "batch" if self.outer is None else None
        assert logits.shape is not None
        outputs[0].shape, outputs[0].type = ir.Shape([batch, *logits.shape[1:]]), logits.type
        for output in outputs[1:]:
            output.shape, output.type = ir.Shape([batch]), ir.TensorType(ir.DataType.INT64)
        name = f"from_depth_{self.depth}" if self.nodes[0].op_type != "Identity" else "stop"
        return ir.Graph(inputs, outputs, nodes=self.nodes, initializers=self.weights, name=name)


def nested(flat: FlatGraph, tables: Mapping[str, Sequence[int]]) -> ir.Graph:
    """The graph from the flat graph's inputs to `logits` (N, classes) and numbers of each image, (N,).

    Args:
        flat: the graph of all depths.
        tables: for each further output its name and its value at every depth.
    """
    scope = _Scope(flat)
    logits, depth = scope.outputs()
    outputs = [scope.op("Identity", [logits])]
    outputs += [scope.op("Gather", [scope.op("Constant", [], value_ints=list(t)), depth]) for t in tables.values()]
    for output, name in zip(outputs, ("logits", *tables), strict=True):
        output.name = name
    images = scope.values[flat.graph.inputs[0]]
    assert images.shape is not None
    images.shape = ir.Shape(["batch", *images.shape[1:]])
    return scope.graph([scope.values[value] for value in flat.graph.inputs], outputs)


def _like(value: ir.Value) -> ir.Value:
    """An input or a weight for another graph."""
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
