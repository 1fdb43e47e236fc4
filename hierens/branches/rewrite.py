"""`Rewriter`: rewrites a trace of a block's layers for packed weights, node by node."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_flatten

from hierens.branches import layers
from hierens.branches.fused_layers import FusedConvolution
from hierens.branches.layer_forms import (
    BINARY,
    TENSOR_ATTRIBUTES,
    UNARY,
    Form,
    PackError,
    layer_form,
    per_channel,
    reads_parents,
)
from hierens.branches.packed_graph import PackedGraph
from hierens.branches.per_branch import PerBranch, change_in_place
from hierens.branches.tensors import Layers, state_of


class Rewriter:
    """Writes the packed graph: each value in channels if possible, else one branch after another, else per branch.

    Attributes:
        looped: modules that are called once per branch on images, with the reasons.
        per_branch: these modules, and those that are called once per branch without images.
    """

    def __init__(
        self,
        layers: Layers,
        trace: fx.Graph,
        constants: fx.GraphModule,
        closed: Mapping[str, str],
        unchecked: Container[str] = (),
    ) -> None:
        """The input of the rewriting.

        Args:
            layers: the block's layers, with the tensors of all branches.
            trace: of the block, layer by layer.
            constants: the module with the tensors that the trace itself created.
            closed: modules to be called unchanged, once per branch, with the reasons.
            unchecked: those of `closed` that differ from the modules with which the grouped form was checked.
        """
        self.layers, self.block, self.trace, self.constants = layers, layers.block, trace, constants
        self.closed, self.unchecked = closed, unchecked
        self.packed = PackedGraph(node for node in trace.nodes if node.op == "placeholder")
        self.looped: dict[str, str] = {}
        self.per_branch: set[str] = set()

    def rewrite(self) -> fx.GraphModule:
        """A module `(*values, width)` on the parents' values that reads its weights from the branches' layers.

        Raises:
            PackError: the block returns something other than feature maps.
        """
        for node in self.trace.nodes:
            if node.op == "output":
                self.packed.graph.output(fx.map_arg(node.args[0], self._returned))
            elif node.op != "placeholder":
                getattr(self, f"_{node.op}")(node)
        return fx.GraphModule(self.packed.parts, self.packed.graph, class_name="PackedBlock")

    def _returned(self, node: fx.Node) -> fx.Node:
        if self.packed.own_form(node) in (Form.WEIGHT, Form.SHARED):
            raise PackError("it returns values other than feature maps")
        return self.packed.value(node, Form.CHANNELS)

    def _per_branch(self, node: fx.Node, target: Any) -> None:
        """Write a call per branch, on images one branch after another and on weights."""
        images = bool(self.packed.input_forms(node) & {Form.CHANNELS, Form.BATCH})
        flat, spec = tree_flatten((tuple(node.args), dict(node.kwargs)))
        forms, values = [], []
        for value in flat:
            if isinstance(value, fx.Node):
                own = self.packed.form(value)
                forms.append(Form.BATCH if own is Form.CHANNELS else own)
                values.append(self.packed.value(value, forms[-1]))
            else:
                forms.append(Form.SHARED)
                values.append(value)
        name = f"per_branch_{len(self.packed.parts)}"
        self.packed.parts[name] = PerBranch(target, forms, spec)
        written = self.packed.graph.call_module(name, (self.packed.width, *values))
        self.packed.put(node, written, Form.BATCH if images else Form.WEIGHT)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _get_attr(self, node: fx.Node) -> None:
        name, packed = str(node.target), self.packed
        owner, _, key = name.rpartition(".")
        if key.startswith("_tensor_constant"):  # the tracer's name for a tensor that is no attribute of a module
            packed.parts["constants"] = self.constants
            constants = packed.graph.get_attr("constants")
            packed.put(node, packed.graph.call_function(getattr, (constants, key)), Form.SHARED)
        elif self.layers.per_branch(name):
            packed.put(node, packed.graph.call_method("stacked", (self._layer(owner), key, packed.width)), Form.WEIGHT)
        else:
            # Read at run time, since `.to(...)` replaces buffers.
            part = packed.part("own", owner, self.block.get_submodule(owner))
            packed.put(node, packed.graph.call_function(getattr, (part, key)), Form.SHARED)

    def _layer(self, name: str) -> fx.Node:
        """A layer with the tensors of all branches."""
        return self.packed.part("layer", name, self.layers.layer(name))

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.block.get_submodule(name)
        forms = self.packed.input_forms(node)
        found = layer_form(module)
        if name in self.closed:
            self._call_each(node, name, self.closed[name], forms)
        elif per_channel(module) and len(forms) <= 1 and Form.WEIGHT not in forms:
            self._call_unchanged(node, name, module, next(iter(forms), Form.SHARED))
        elif found is not None and len(node.args) == 1 and not node.kwargs and forms and Form.WEIGHT not in forms:
            form, function = found
            if function is layers.stochastic_depth and forms == {Form.BATCH}:
                self._call_unchanged(node, name, module, Form.BATCH)
            else:
                self._call_packed(node, name, module, form, function)
        elif next(state_of(module), None) is None and Form.WEIGHT not in forms:
            self._call_unchanged(node, name, module, Form.BATCH if forms else Form.SHARED)
        else:
            self._call_each(node, name, f"{type(module).__name__} has no packed form", forms)

    def _call_unchanged(self, node: fx.Node, name: str, module: nn.Module, form: Form) -> None:
        """Call a module without weights on values in a form."""
        self.packed.parts[name] = module
        self.packed.copy(node, form)

    def _call_packed(self, node: fx.Node, name: str, module: nn.Module, form: Form, function: Any) -> None:
        """Call the packed form of a layer."""
        packed, channelwise = self.packed, self.packed.channelwise
        shared = packed.own_form(_first(node)) is Form.PARENTS and reads_parents(module, function)
        x = packed.value(_first(node), Form.PARENTS if shared else form)
        layer = packed.part("fused", name, module) if isinstance(module, FusedConvolution) else self._layer(name)
        kwargs: dict[str, Any] = {"shared": True} if shared else {}
        packed.put(node, packed.graph.call_function(function, (layer, x, packed.width), kwargs), form)
        if function is layers.linear:
            packed.channelwise = channelwise  # the conversion costs little here: see `AnyLevel.channelwise`

    def _call_each(self, node: fx.Node, name: str, reason: str, forms: set[Form]) -> None:
        """Call the module of each branch."""
        modules = self.layers.modules(name)
        read_elsewhere = any(len(source.users) > 1 for source in node.all_input_nodes)
        if name in self.unchecked and read_elsewhere and change_in_place(modules):
            raise PackError(f"{name} changes a tensor in place that other layers read")
        self._per_branch(node, modules)
        self.per_branch.add(name)
        if forms - {Form.WEIGHT}:
            self.looped[name] = reason

    def _call_function(self, node: fx.Node) -> None:
        if node.target is getattr:
            self._attribute(node, node.args[1])
        elif node.target is operator.getitem:
            self._item(node)
        else:
            self._operation(node)

    def _call_method(self, node: fx.Node) -> None:
        packed = self.packed
        if node.target in TENSOR_ATTRIBUTES:
            self._attribute(node, node.target)
        elif node.target in ("expand", "repeat") and self._expands_to_batch(node):
            rule = layers.expand_to_batch if node.target == "expand" else layers.repeat_to_batch
            weight = packed.value(_first(node), Form.WEIGHT)
            sizes = fx.map_arg(_sizes(node), lambda old: packed.value(old, Form.SHARED))
            packed.put(node, packed.graph.call_function(rule, (weight, sizes, packed.width)), Form.BATCH)
        else:
            self._operation(node)
            if str(node.target).endswith("_"):
                packed.replace(_first(node), node)

    def _expands_to_batch(self, node: fx.Node) -> bool:
        """Whether weights are expanded to the batch size: then the first size is a value of the trace."""
        weights = self.packed.input_forms(node) == {Form.WEIGHT} and self.packed.form(_first(node)) is Form.WEIGHT
        return weights and isinstance(_sizes(node)[0], fx.Node)

    def _attribute(self, node: fx.Node, name: Any) -> None:
        """Write a query about a tensor rather than its values: one result for all branches."""
        source, packed = _first(node), self.packed
        form = packed.own_form(source)
        shapes = {
            Form.PARENTS: layers.shape_of_parents,
            Form.CHANNELS: layers.shape_in_batch,
            Form.WEIGHT: layers.shape_of_one,
        }
        if name not in TENSOR_ATTRIBUTES and form is not Form.SHARED:
            self._operation(node)  # such as x.T
        elif form in shapes and name in ("shape", "size", "numel", "ndim", "dim"):
            result = packed.graph.call_function(shapes[form], (packed.value(source, form), packed.width))
            if name == "size" and len(node.args) > 1:
                result = packed.graph.call_function(operator.getitem, (result, node.args[1]))
            elif name == "numel":
                result = packed.graph.call_method("numel", (result,))
            elif name in ("ndim", "dim"):
                result = packed.graph.call_function(len, (result,))
            packed.put(node, result, Form.SHARED)
        else:
            result = packed.graph.node_copy(node, lambda old: packed.value(old, packed.own_form(old)))
            packed.put(node, result, Form.SHARED)

    def _item(self, node: fx.Node) -> None:
        source = node.args[0]
        if isinstance(source, fx.Node) and _returns_tuple(source):
            self.packed.copy(node, self.packed.form(source))
        else:
            self._operation(node)

    def _operation(self, node: fx.Node) -> None:
        """Write a function or method: in channels if possible, else one branch after another, else per branch."""
        forms = self.packed.input_forms(node)
        if not forms:
            self.packed.copy(node, Form.SHARED)
        elif Form.WEIGHT in forms:
            self._operation_with_weights(node)
        elif Form.CHANNELS not in forms or not self._stays_in_channels(node):
            self.packed.copy(node, Form.BATCH)

    def _operation_with_weights(self, node: fx.Node) -> None:
        op, args = BINARY.get(node.target), [arg for arg in node.args if isinstance(arg, fx.Node)]
        own = [self.packed.form(arg) for arg in args]
        if op is None or len(args) != 2 or node.kwargs or len(set(own)) != 2 or Form.SHARED in own:
            self._per_branch(node, node.target)
            return
        first = own[0] is Form.WEIGHT
        form = own[1 if first else 0]
        rule = layers.with_weights_of_channels if form is Form.CHANNELS else layers.with_weights
        values = [self.packed.value(arg, form) for arg, form in zip(args, own, strict=True)]
        packed = self.packed
        packed.put(node, packed.graph.call_function(rule, (op.removeprefix("i"), *values, packed.width, first)), form)

    def _stays_in_channels(self, node: fx.Node) -> bool:
        """Write an operation that treats each channel separately and alike; False for any other operation."""
        name, packed = _name(node), self.packed
        images = [n for n in node.all_input_nodes if packed.form(n) is not Form.SHARED]
        plain = len(images) == len(node.all_input_nodes)
        if node.target in BINARY and plain and len(images) == 1:
            packed.copy(node, Form.CHANNELS)
        elif node.target in BINARY and plain and len(node.args) == 2 and not node.kwargs:
            packed.call(node, Form.CHANNELS, layers.broadcast_channels, BINARY[node.target], *node.args)
        elif (node.target in UNARY or name == "pad_same") and len(images) == 1:
            packed.copy(node, Form.CHANNELS)
        elif name in ("cat", "concat") and _dim(node, 1, 0) == 1:
            packed.call(node, Form.CHANNELS, layers.concatenate_channels, node.args[0])
        elif name in ("split", "chunk") and _dim(node, 2, 0) == 1 and len(node.args) > 1 and plain:
            rule = layers.split_channels if name == "split" else layers.chunk_channels
            packed.call(node, Form.CHANNELS, rule, *node.args[:2])
        elif _reduces_positions(node, name) or (name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,)):
            packed.copy(node, Form.CHANNELS)
        else:
            return False
        return True


def _first(node: fx.Node) -> fx.Node:
    """The first argument, on which a method is called."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes in `x.expand(2, 3)` and in `x.expand((2, 3))`."""
    given = node.args[1]
    return tuple(given) if isinstance(given, (tuple, list)) else tuple(node.args[1:])


def _name(node: fx.Node) -> str:
    """The name of a function or method; the same for both if an operation exists as both."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _returns_tuple(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and _name(node) in ("split", "chunk", "unbind", "tensor_split")


def _dim(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)


def _reduces_positions(node: fx.Node, name: str) -> bool:
    """Whether a mean, sum or maximum runs over height and width only."""
    dims = _dim(node, 1, None)
    dims = [dims] if isinstance(dims, int) else dims
    return name in ("mean", "sum", "amax") and isinstance(dims, (tuple, list)) and set(dims) <= {2, 3}
