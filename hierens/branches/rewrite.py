"""A trace of a block's layers, rewritten node by node for packed weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from hierens.branches import layers as layers
from hierens.branches.fused_layers import FusedConvolution
from hierens.branches.rules import ABOUT, BINARY, UNARY, Form, PackError, layer_form, per_channel, reads_parents
from hierens.branches.tensors import BranchSlice, Layer, state_of


class PerBranch(nn.Module):
    """Calls a function or method once per branch, or each branch's module, and puts the results together again."""

    def __init__(self, target: Any, forms: Sequence[Form], spec: Any) -> None:
        """What to call: a function, a method's name, or a list with a module for each branch."""
        super().__init__()
        self.target = target  # modules in a list, which does not register them
        self.forms, self.spec = list(forms), spec
        self.changes = isinstance(target, list) and change_in_place(target)

    def forward(self, width: BranchSlice, *flat: Any) -> Any:
        """What the branches return, one after another if any argument holds images, else stacked."""
        split = [self._split(value, form, width) for value, form in zip(flat, self.forms, strict=True)]
        if self.changes:  # views of one tensor may not be changed one by one where gradients are recorded
            split = [tree_map_only(Tensor, Tensor.clone, values) for values in split]
        results = []
        for branch in range(width.active):
            args, kwargs = tree_unflatten([values[branch] for values in split], self.spec)
            if isinstance(self.target, list):
                results.append(self.target[width.start + branch](*args, **kwargs))
            elif isinstance(self.target, str):
                results.append(getattr(args[0], self.target)(*args[1:], **kwargs))
            else:
                results.append(self.target(*args, **kwargs))
        return self._joined(results)

    @staticmethod
    def _split(value: Any, form: Form, width: BranchSlice) -> Sequence[Any]:
        if form is Form.WEIGHT and isinstance(value, Tensor):
            return value.unbind()
        if form is Form.BATCH and isinstance(value, Tensor):
            return value.unflatten(0, (width.active, -1)).unbind()
        return [value] * width.active

    def _joined(self, results: list[Any]) -> Any:
        if isinstance(results[0], (tuple, list)):
            return tuple(self._joined(list(parts)) for parts in zip(*results, strict=True))
        if not isinstance(results[0], Tensor):
            return results[0]
        return torch.cat(results) if Form.BATCH in self.forms else torch.stack(results)


def change_in_place(modules: Sequence[nn.Module]) -> bool:
    """Whether any of these modules may write into what it is given."""
    return any(getattr(part, "inplace", False) for module in modules for part in module.modules())


class Layers(Protocol):
    """The block of a level, whose layers hold the tensors of all branches.

    Attributes:
        block: has the block's structure; what all branches share is read from it.
    """

    block: nn.Module

    def layer(self, name: str) -> Layer:
        """A layer of all branches."""

    def modules(self, name: str) -> list[nn.Module]:
        """Each branch's own module."""

    def per_branch(self, name: str) -> bool:
        """Whether a tensor differs from branch to branch."""


class Rewriter:
    """Writes the packed graph, node by node."""

    def __init__(
        self,
        layers: Layers,
        trace: fx.Graph,
        constants: fx.GraphModule,
        closed: Mapping[str, str],
        unlike: Container[str] = (),
    ) -> None:
        """What to rewrite.

        Args:
            layers: the block's layers, with the tensors of all branches.
            trace: of the block, layer by layer.
            constants: holds the tensors that the trace made itself.
            closed: modules that are to be called as they are, once per branch, and why.
            unlike: those of them that are so because they are not what the block's form was checked with.
        """
        self.layers, self.block, self.trace, self.constants = layers, layers.block, trace, constants
        self.closed, self.unlike = closed, unlike
        self.graph = fx.Graph()
        self.made: dict[tuple[fx.Node, Form], fx.Node] = {}
        self.form: dict[fx.Node, Form] = {}
        self.tuples: set[fx.Node] = set()
        self.parts: dict[str, Any] = {}
        self.places: dict[tuple[str, str], str] = {}  # where parts stand in the graph, by what they are
        self.changed: dict[fx.Node, fx.Node] = {}  # a value that was changed in place, and the call that did
        self.looped: dict[str, str] = {}
        self.apart: set[str] = set()  # modules that are called once per branch
        self.conversions: set[tuple[fx.Node, Form]] = set()

    def rewrite(self) -> fx.GraphModule:
        """A module `(*values, width)` on values of the parents, which reads its weights from the branches' own layers.

        Raises:
            PackError: the block hands on something other than images.
        """
        placeholders = [node for node in self.trace.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._put(node, self.graph.placeholder(node.name), Form.PARENTS)
        self.width = self.graph.placeholder("width")
        for node in self.trace.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._handed_on))
            elif node.op != "placeholder":
                getattr(self, f"_{node.op}")(node)
        return fx.GraphModule(self.parts, self.graph, class_name="PackedBlock")

    def _handed_on(self, node: fx.Node) -> fx.Node:
        if self.form[node] in (Form.WEIGHT, Form.SHARED):
            raise PackError("values other than feature maps cross out of it")
        return self._as(node, Form.CHANNELS)

    # --- values and their forms --------------------------------------------------------------------------------------

    def _put(self, node: fx.Node, made: fx.Node, form: Form) -> None:
        self.form[node] = form
        self.made[node, form] = made

    def _as(self, node: fx.Node, form: Form) -> fx.Node:
        """A value in another form; a conversion is written once."""
        node = self._current(node)
        own = self.form[node]
        if own is Form.SHARED or own is form:
            return self.made[node, own]
        if own is Form.WEIGHT or form not in (Form.CHANNELS, Form.BATCH):
            raise PackError(f"{node.name} is used both as weights and as images")
        if (node, form) not in self.made:
            if own is Form.PARENTS and form is Form.CHANNELS:
                value, convert = self.made[node, own], layers.to_siblings
            elif form is Form.BATCH:
                value, convert = self._as(node, Form.CHANNELS), layers.to_batch
            else:
                value, convert = self.made[node, own], layers.to_channels
            self.conversions.add((node, form))
            self.made[node, form] = self.graph.call_function(convert, (value, self.width))
        return self.made[node, form]

    def _current(self, node: fx.Node) -> fx.Node:
        """A value as the last change in place left it."""
        while node in self.changed:
            node = self.changed[node]
        return node

    def _form(self, node: fx.Node) -> Form:
        """The form of a value; what siblings share counts as side by side."""
        form = self.form[self._current(node)]
        return Form.CHANNELS if form is Form.PARENTS else form

    def _forms(self, node: fx.Node) -> set[Form]:
        return {self._form(n) for n in node.all_input_nodes} - {Form.SHARED}

    def _copied(self, node: fx.Node, form: Form) -> None:
        """The same call on values in one form."""
        self._put(node, self.graph.node_copy(node, lambda old: self._as(old, form)), form)

    def _called(self, node: fx.Node, form: Form, function: Callable[..., Any], *args: Any) -> None:
        """A function that takes the width, on values in one form."""
        mapped = fx.map_arg(args, lambda old: self._as(old, form))
        self._put(node, self.graph.call_function(function, (*mapped, self.width)), form)

    def _per_branch(self, node: fx.Node, target: Any) -> None:
        """A call per branch, on images one after another and on weights."""
        images = bool(self._forms(node) & {Form.CHANNELS, Form.BATCH})
        flat, spec = tree_flatten((tuple(node.args), dict(node.kwargs)))
        forms, values = [], []
        for value in flat:
            if isinstance(value, fx.Node):
                own = self._form(value)
                forms.append(Form.BATCH if own is Form.CHANNELS else own)
                values.append(self._as(value, forms[-1]))
            else:
                forms.append(Form.SHARED)
                values.append(value)
        name = f"per_branch_{len(self.parts)}"
        self.parts[name] = PerBranch(target, forms, spec)
        made = self.graph.call_module(name, (self.width, *values))
        self._put(node, made, Form.BATCH if images else Form.WEIGHT)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _get_attr(self, node: fx.Node) -> None:
        name = str(node.target)
        owner, _, key = name.rpartition(".")
        if key.startswith("_tensor_constant"):  # the tracer's name for what stands nowhere else
            self.parts["constants"] = self.constants
            self._put(node, self.graph.call_function(getattr, (self.graph.get_attr("constants"), key)), Form.SHARED)
        elif self.layers.per_branch(name):
            layer = self._layer(owner)
            self._put(node, self.graph.call_method("stacked", (layer, key, self.width)), Form.WEIGHT)
        else:
            # Read at run time: `.to(...)` puts another tensor in a buffer's place.
            part = self._part(("own", owner), self.block.get_submodule(owner))
            self._put(node, self.graph.call_function(getattr, (part, key)), Form.SHARED)

    def _layer(self, name: str) -> fx.Node:
        """A layer with the tensors of all branches."""
        return self._part(("layer", name), self.layers.layer(name))

    def _part(self, key: tuple[str, str], value: Any) -> fx.Node:
        """Something that the graph holds, once."""
        place = self.places.setdefault(key, f"{key[0]}_{len(self.places)}")
        self.parts.setdefault(place, value)
        return self.graph.get_attr(place)

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.block.get_submodule(name)
        forms = self._forms(node)
        if name in self.closed:
            self._call_apart(node, name, self.closed[name], forms)
            return
        if per_channel(module) and len(forms) <= 1 and Form.WEIGHT not in forms:
            self.parts[name] = module
            self._copied(node, next(iter(forms), Form.SHARED))
            return
        found = layer_form(module)
        if found is not None and len(node.args) == 1 and not node.kwargs and forms and Form.WEIGHT not in forms:
            form, function = found
            if function is layers.stochastic_depth and forms == {Form.BATCH}:
                self.parts[name] = module
                self._copied(node, Form.BATCH)
                return
            before = set(self.conversions)
            shared = self.form[self._current(_first(node))] is Form.PARENTS and reads_parents(module, function)
            mapped = self._as(_first(node), Form.PARENTS if shared else form)
            kwargs: dict[str, Any] = {"shared": True} if shared else {}
            layer = self._part(("fused", name), module) if isinstance(module, FusedConvolution) else self._layer(name)
            made = self.graph.call_function(function, (layer, mapped, self.width), kwargs)
            if function is layers.linear:
                self.conversions = before  # cheap, and worth it: see `channelwise`
            self._put(node, made, form)
        elif next(state_of(module), None) is None and Form.WEIGHT not in forms:
            self.parts[name] = module
            self._copied(node, Form.BATCH if forms else Form.SHARED)
        else:
            self._call_apart(node, name, f"{type(module).__name__} has no packed form", forms)

    def _call_apart(self, node: fx.Node, name: str, because: str, forms: set[Form]) -> None:
        """Call each branch's own module."""
        modules = self.layers.modules(name)
        read_elsewhere = any(len(source.users) > 1 for source in node.all_input_nodes)
        if name in self.unlike and read_elsewhere and change_in_place(modules):
            raise PackError(f"{name} changes in place what other layers read")
        self._per_branch(node, modules)
        self.apart.add(name)
        if forms - {Form.WEIGHT}:
            self.looped[name] = because

    def _call_function(self, node: fx.Node) -> None:
        if node.target is getattr:
            self._attribute(node, node.args[1])
        elif node.target is operator.getitem:
            self._item(node)
        else:
            self._operation(node)

    def _call_method(self, node: fx.Node) -> None:
        if node.target in ABOUT:
            self._attribute(node, node.target)
        elif node.target in ("expand", "repeat") and self._spreads(node):
            rule = layers.spread if node.target == "expand" else layers.repeated
            weight = self._as(_first(node), Form.WEIGHT)
            sizes = fx.map_arg(_sizes(node), lambda old: self._as(old, Form.SHARED))
            self._put(node, self.graph.call_function(rule, (weight, sizes, self.width)), Form.BATCH)
        else:
            self._operation(node)
            if str(node.target).endswith("_"):
                self.changed[_first(node)] = node

    def _spreads(self, node: fx.Node) -> bool:
        """Whether weights are given the size of the batch: their first size is then not a plain number."""
        weights = self._forms(node) == {Form.WEIGHT} and self.form[_first(node)] is Form.WEIGHT
        return weights and isinstance(_sizes(node)[0], fx.Node)

    def _attribute(self, node: fx.Node, name: Any) -> None:
        """What is asked about a tensor, not of it: one answer for all branches."""
        source = self._current(_first(node))
        form = self.form[source]
        shapes = {
            Form.PARENTS: layers.shape_of_parents,
            Form.CHANNELS: layers.shape_in_batch,
            Form.WEIGHT: layers.shape_of_one,
        }
        if name not in ABOUT and form is not Form.SHARED:
            self._operation(node)  # such as x.T
        elif form in shapes and name in ("shape", "size", "numel", "ndim", "dim"):
            answer = self.graph.call_function(shapes[form], (self._as(source, form), self.width))
            if name == "size" and len(node.args) > 1:
                answer = self.graph.call_function(operator.getitem, (answer, node.args[1]))
            elif name == "numel":
                answer = self.graph.call_method("numel", (answer,))
            elif name in ("ndim", "dim"):
                answer = self.graph.call_function(len, (answer,))
            self._put(node, answer, Form.SHARED)
        else:
            self._put(node, self.graph.node_copy(node, lambda old: self._as(old, self.form[old])), Form.SHARED)

    def _item(self, node: fx.Node) -> None:
        source = node.args[0]
        if isinstance(source, fx.Node) and source in self.tuples:
            self._copied(node, self._form(source))
        else:
            self._operation(node)

    def _operation(self, node: fx.Node) -> None:
        """A function or method: in channels if it can be, else per sample, else branch by branch."""
        forms = self._forms(node)
        if not forms:
            self._put(node, self.graph.node_copy(node, lambda old: self._as(old, Form.SHARED)), Form.SHARED)
        elif Form.WEIGHT in forms:
            self._operation_with_weights(node)
        elif Form.CHANNELS in forms and self._stays_in_channels(node):
            pass
        else:
            self._copied(node, Form.BATCH)
        if _name(node) in ("split", "chunk", "unbind", "tensor_split"):
            self.tuples.add(node)

    def _operation_with_weights(self, node: fx.Node) -> None:
        op, args = BINARY.get(node.target), [arg for arg in node.args if isinstance(arg, fx.Node)]
        own = [self._form(arg) for arg in args]
        if op is None or len(args) != 2 or node.kwargs or len(set(own)) != 2 or Form.SHARED in own:
            self._per_branch(node, node.target)
            return
        first = own[0] is Form.WEIGHT
        form = own[1 if first else 0]
        rule = layers.with_weights_of_channels if form is Form.CHANNELS else layers.with_weights
        values = [self._as(arg, form) for arg, form in zip(args, own, strict=True)]
        self._put(node, self.graph.call_function(rule, (op.removeprefix("i"), *values, self.width, first)), form)

    def _stays_in_channels(self, node: fx.Node) -> bool:
        """Write an operation that treats channels alike and apart; False if it is none."""
        name, images = _name(node), [n for n in node.all_input_nodes if self.form[n] is not Form.SHARED]
        plain = len(images) == len(node.all_input_nodes)
        if node.target in BINARY and plain and len(images) == 1:
            self._copied(node, Form.CHANNELS)
        elif node.target in BINARY and plain and len(node.args) == 2 and not node.kwargs:
            self._called(node, Form.CHANNELS, layers.broadcast_channels, BINARY[node.target], *node.args)
        elif (node.target in UNARY or name == "pad_same") and len(images) == 1:
            self._copied(node, Form.CHANNELS)
        elif name in ("cat", "concat") and _dim(node, 1, 0) == 1:
            self._called(node, Form.CHANNELS, layers.concatenate_channels, node.args[0])
        elif name in ("split", "chunk") and _dim(node, 2, 0) == 1 and len(node.args) > 1 and plain:
            rule = layers.split_channels if name == "split" else layers.chunk_channels
            self._called(node, Form.CHANNELS, rule, *node.args[:2])
        elif _reduces_positions(node, name) or (name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,)):
            self._copied(node, Form.CHANNELS)
        else:
            return False
        return True


def _first(node: fx.Node) -> fx.Node:
    """What a call is made on."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes in `x.expand(2, 3)` and in `x.expand((2, 3))`."""
    given = node.args[1]
    return tuple(given) if isinstance(given, (tuple, list)) else tuple(node.args[1:])


def _name(node: fx.Node) -> str:
    """What exists both as a function and as a method goes by one name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _dim(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)


def _reduces_positions(node: fx.Node, name: str) -> bool:
    """Whether a mean, sum or maximum runs over height and width only."""
    dims = _dim(node, 1, None)
    dims = [dims] if isinstance(dims, int) else dims
    return name in ("mean", "sum", "amax") and isinstance(dims, (tuple, list)) and set(dims) <= {2, 3}
