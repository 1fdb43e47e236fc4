"""`PackedGraph`: the graph for packed weights while it is written, with each value of the trace in its forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from hierens.branches import layers
from hierens.branches.layer_forms import Form, PackError


@dataclass
class _Value:
    """A value of the trace: the form in which it was computed, and its nodes in the packed graph by form."""

    form: Form
    nodes: dict[Form, fx.Node]


class PackedGraph:
    """A graph for packed weights.

    Attributes:
        graph: the nodes written so far.
        width: the input that says which branches run, a `BranchSlice`.
        parts: the modules and layers that the graph uses, by name.
        channelwise: whether no feature map was converted from channels to batch.
    """

    def __init__(self, inputs: Iterable[fx.Node]) -> None:
        """An empty graph with the inputs of a trace, in the form `PARENTS`, and `width`."""
        self.graph = fx.Graph()
        self.parts: dict[str, Any] = {}
        self.channelwise = True
        self._values: dict[fx.Node, _Value] = {}
        self._names: dict[tuple[str, str], str] = {}
        for node in inputs:
            self.put(node, self.graph.placeholder(node.name), Form.PARENTS)
        self.width = self.graph.placeholder("width")

    def put(self, node: fx.Node, written: fx.Node, form: Form) -> None:
        """Note which node of the packed graph computes a value of the trace, and in which form."""
        self._values[node] = _Value(form, {form: written})

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Note that `by` has changed a value in place: both are one value from now on."""
        value, new = self._values[node], self._values[by]
        value.form, value.nodes = new.form, new.nodes
        self._values[by] = value

    def value(self, node: fx.Node, form: Form) -> fx.Node:
        """A value in a form; a conversion is written if necessary, once.

        Raises:
            PackError: there is no such conversion.
        """
        value = self._values[node]
        if value.form in (Form.SHARED, form):
            return value.nodes[value.form]
        if value.form is Form.WEIGHT or form not in (Form.CHANNELS, Form.BATCH):
            raise PackError(f"{node.name} is used both as weights and as images")
        if form not in value.nodes:
            if value.form is Form.PARENTS and form is Form.CHANNELS:
                source, convert = value.nodes[value.form], layers.to_siblings
            elif form is Form.BATCH:
                source, convert = self.value(node, Form.CHANNELS), layers.to_batch
                self.channelwise = False
            else:
                source, convert = value.nodes[value.form], layers.to_channels
            value.nodes[form] = self.graph.call_function(convert, (source, self.width))
        return value.nodes[form]

    def own_form(self, node: fx.Node) -> Form:
        """The form in which a value was computed."""
        return self._values[node].form

    def form(self, node: fx.Node) -> Form:
        """The same, with `CHANNELS` for `PARENTS`."""
        form = self.own_form(node)
        return Form.CHANNELS if form is Form.PARENTS else form

    def input_forms(self, node: fx.Node) -> set[Form]:
        """The forms of a node's inputs, except `SHARED`."""
        return {self.form(n) for n in node.all_input_nodes} - {Form.SHARED}

    def copy(self, node: fx.Node, form: Form) -> None:
        """Write the same operation, on values in one form."""
        self.put(node, self.graph.node_copy(node, lambda old: self.value(old, form)), form)

    def call(self, node: fx.Node, form: Form, function: Callable[..., Any], *args: Any) -> None:
        """Write a call of a function that takes `width` as its last argument, on values in one form."""
        args = fx.map_arg(args, lambda old: self.value(old, form))
        self.put(node, self.graph.call_function(function, (*args, self.width)), form)

    def part(self, kind: str, name: str, value: Any) -> fx.Node:
        """A node that returns a module or layer, which the graph stores once."""
        place = self._names.setdefault((kind, name), f"{kind}_{len(self._names)}")
        self.parts.setdefault(place, value)
        return self.graph.get_attr(place)
