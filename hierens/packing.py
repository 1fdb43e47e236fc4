"""A block run for all its branches at once, by rewriting its trace for packed weights.

The block is traced down to single layers. Convolutions and all that works per channel keep the branches side by side
in channels; whatever works per sample takes them one after another in the batch; a layer for which neither can be done
is called once per branch, in place, while the rest of the block stays packed. Where the form changes, a conversion is
written into the graph. Packing is an optimisation, never a need: `hierens.branching.self_check` says whether it is
right, and a block that cannot be traced to its layers is looped as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from typing import Any

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.norm import GroupNorm as TimmGroupNorm
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models.nfnet import NormFreeBlock
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from hierens import packed_layers as layers
from hierens.errors import first_line
from hierens.modes import in_mode
from hierens.packed import Width, branch_states, caches_of, forget, state_of

_MOST_CLOSED = 40  # modules of a block that may be left whole because they cannot be traced


class PackError(ValueError):
    """A block has no packed form; the message says which part of it stands in the way."""


class Form(Enum):
    """How a value in the packed graph holds its branches."""

    CHANNELS = "side by side: (N, w*C, ...)"
    BATCH = "one after another: (w*N, C, ...)"
    WEIGHT = "stacked, without images: (w, ...)"
    SHARED = "the same for all"


class Packed:
    """The packed form of a block: a graph for evaluation and one for training.

    Attributes:
        looped: modules that are called once per branch, in place, and why.
        channelwise: whether no feature map changes its form but into a last linear layer.
    """

    def __init__(self, block: fx.GraphModule, scalars: frozenset[str], constants: nn.Module) -> None:
        """Rewrite a block.

        Args:
            block: with packed parameters and persistent buffers.
            scalars: names of those that have no dimensions in a single branch.
            constants: takes, as buffers that are not saved, tensors that the block's code makes itself.

        Raises:
            PackError: the block cannot be traced to its layers, or hands on something other than tensors.
        """
        closed: dict[str, str] = {}
        traces = [_traced(block, mode, closed) for mode in (False, True)]
        rewriters = [_Rewriter(block, trace, scalars, constants, closed) for trace in traces]
        graphs = [rewriter.rewrite() for rewriter in rewriters]
        same = str(graphs[0].code) == str(graphs[1].code)
        self._graphs = [graphs[0], graphs[0] if same else graphs[1]]
        self.looped = rewriters[0].looped
        self.channelwise = not any(form is Form.BATCH for _, form in rewriters[0].conversions)

    def __call__(self, values: Sequence[Tensor], width: Width, training: bool) -> Any:
        """What the block returns, all side by side, for inputs side by side."""
        return self._graphs[training](*values, width)


# --- what has a packed form ------------------------------------------------------------------------------------------

# Layers with a form of their own; what they take and return, and the function.
_LAYERS: dict[type[nn.Module], tuple[Form, Callable[..., Tensor]]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, tl.Conv2dSame), (Form.CHANNELS, layers.convolution)),
    **dict.fromkeys((tl.StdConv2d, StdConv2dSame), (Form.CHANNELS, layers.convolution)),
    **dict.fromkeys((tl.ScaledStdConv2d, tl.ScaledStdConv2dSame), (Form.CHANNELS, layers.convolution)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, tl.BatchNormAct2d), (Form.CHANNELS, layers.batch_norm)),
    **dict.fromkeys((nn.GroupNorm, TimmGroupNorm, tl.GroupNorm1), (Form.CHANNELS, layers.group_norm)),
    **dict.fromkeys((tl.GroupNormAct, tl.GroupNorm1Act), (Form.CHANNELS, layers.group_norm)),
    **dict.fromkeys((tl.LayerNorm2d, tl.LayerNormAct2d), (Form.CHANNELS, layers.channel_layer_norm)),
    tl.BlurPool2d: (Form.CHANNELS, layers.blur_pool),
    tl.DropPath: (Form.CHANNELS, layers.stochastic_depth),
    **dict.fromkeys((nn.Linear, tl.Linear), (Form.BATCH, layers.linear)),
    **dict.fromkeys((nn.LayerNorm, tl.LayerNorm, tl.LayerNormAct), (Form.BATCH, layers.layer_norm)),
}

# Layers without weights that treat every channel alike and apart from the others: they run in either form as they are.
_PER_CHANNEL: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample),
    *(tl.AvgPool2dSame, MaxPool2dSame, nn.Dropout, nn.Identity),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
)
_TIMM_ACTIVATIONS = ("timm.layers.activations", "timm.layers.activations_me")

# Operations of two values, by the names under which `packed_layers` has them; the trace knows them as operators,
# functions and methods.
_BINARY: dict[Any, str] = {
    **{getattr(operator, name): name for name in ("add", "sub", "mul", "truediv", "pow")},
    **{getattr(operator, name): name for name in ("iadd", "isub", "imul", "itruediv")},
    **{getattr(torch, name): name for name in ("add", "sub", "mul", "pow", "maximum", "minimum")},
    **{name: name for name in ("add", "sub", "mul", "pow", "maximum", "minimum")},
    **{f"{name}_": f"i{name}" for name in ("add", "sub", "mul")},
    torch.div: "truediv",
    "div": "truediv",
    "div_": "itruediv",
}
_UNARY = {
    *(operator.neg, torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.square, torch.sqrt, torch.exp, torch.abs),
    *(F.relu, F.relu6, F.silu, F.gelu, F.mish, F.leaky_relu, F.elu, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, F.tanh, F.softplus, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d),
    *(F.interpolate, F.dropout),
    *("clamp", "clamp_", "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone"),
    *("sqrt", "square", "exp", "abs", "float", "detach", "to", "type_as"),
}
# Kept whole by timm because a trace would lose a change in place, which is followed here.
_OPENED = (NormFreeBlock,)
_ABOUT = ("dtype", "device", "ndim", "requires_grad", "is_cuda")


def _per_channel(module: nn.Module) -> bool:
    if type(module) is nn.Flatten:
        return module.start_dim == 1
    known = type(module) in _PER_CHANNEL or type(module).__module__ in _TIMM_ACTIVATIONS
    return known and next(module.parameters(), None) is None


def _layer(module: nn.Module) -> tuple[Form, Callable[..., Tensor]] | None:
    """The packed form of a layer, if its type has one and its settings allow it."""
    found = _LAYERS.get(type(module))
    inner = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
    if found is None or not layers.has_layer(module) or not all(_per_channel(part) for part in inner):
        return None
    return found


# --- tracing ---------------------------------------------------------------------------------------------------------


class _FineTracer(fx.Tracer):
    """Opens every module but those with a packed form, torch's and timm's own untraceable ones, and those `closed`."""

    def __init__(self, closed: Container[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed, self.failed = closed, ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _layer(m) is not None or _per_channel(m) or module_qualified_name in self.closed:
            return True
        if isinstance(m, (nn.Sequential, fx.GraphModule)):
            return False
        return type(m).__module__.startswith("torch.nn") or (
            type(m) in get_notrace_modules() and type(m) not in _OPENED
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _traced(block: fx.GraphModule, training: bool, closed: dict[str, str]) -> fx.Graph:
    """A trace in one mode, in which modules that cannot be traced were left whole (and added to `closed`, with why)."""
    caches = caches_of(block)
    with in_mode(block, training):
        for _ in range(_MOST_CLOSED):
            tracer = _FineTracer(closed)
            forget(caches)
            try:
                return tracer.trace(block)
            except Exception as error:
                if not tracer.failed or tracer.failed in closed:
                    raise PackError(f"it cannot be traced layer by layer: {first_line(error)}") from error
                closed[tracer.failed] = f"cannot be traced: {first_line(error)}"
            finally:
                forget(caches)  # of what the trace put there
    raise PackError(f"more than {_MOST_CLOSED} of its modules cannot be traced")


# --- rewriting -------------------------------------------------------------------------------------------------------


class _PerBranch(nn.Module):
    """Calls a function, method or module once per branch, and puts the results together again."""

    def __init__(self, target: Any, forms: Sequence[Form], spec: Any, scalars: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.target = [target]  # in a list, so that a module is not registered twice
        self.forms, self.spec, self.scalars = list(forms), spec, scalars
        self._caches = caches_of(target) if isinstance(target, nn.Module) else []

    def forward(self, width: Width, *flat: Any) -> Any:
        split = [self._split(value, form, width) for value, form in zip(flat, self.forms, strict=True)]
        target, states = self.target[0], [None] * width.active
        if isinstance(target, nn.Module):
            states = branch_states(target, self.scalars, width.total, width.active)
        results = []
        for branch, state in enumerate(states):
            args, kwargs = tree_unflatten([values[branch] for values in split], self.spec)
            if state is not None:
                forget(self._caches)
                results.append(functional_call(target, state, args, kwargs))
            else:
                call = getattr(args[0], target) if isinstance(target, str) else target
                results.append(call(*(args[1:] if isinstance(target, str) else args), **kwargs))
        return self._joined(results)

    @staticmethod
    def _split(value: Any, form: Form, width: Width) -> Sequence[Any]:
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


class _Rewriter:
    """Writes the packed graph, node by node."""

    def __init__(
        self,
        block: fx.GraphModule,
        trace: fx.Graph,
        scalars: frozenset[str],
        constants: nn.Module,
        closed: Mapping[str, str],
    ) -> None:
        self.block, self.trace, self.scalars, self.constants = block, trace, scalars, constants
        self.closed = closed
        self.graph = fx.Graph()
        self.made: dict[tuple[fx.Node, Form], fx.Node] = {}
        self.form: dict[fx.Node, Form] = {}
        self.tuples: set[fx.Node] = set()
        self.parts: dict[str, nn.Module] = {}
        self.packed_names = {name for name, _ in state_of(block)}
        self.changed: dict[fx.Node, fx.Node] = {}  # a value that was changed in place, and the call that did
        self.looped: dict[str, str] = {}
        self.conversions: set[tuple[fx.Node, Form]] = set()

    def rewrite(self) -> fx.GraphModule:
        placeholders = [node for node in self.trace.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._put(node, self.graph.placeholder(node.name), Form.CHANNELS)
        self.width = self.graph.placeholder("width")
        for node in self.trace.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._handed_on))
            elif node.op != "placeholder":
                getattr(self, f"_{node.op}")(node)
        return fx.GraphModule(self.parts, self.graph, class_name="PackedBlock")

    def _handed_on(self, node: fx.Node) -> fx.Node:
        if self.form[node] in (Form.WEIGHT, Form.SHARED):
            raise PackError(f"{node.name}, which it hands on, holds no images")
        return self._as(node, Form.CHANNELS)

    # --- values and their forms --------------------------------------------------------------------------------------

    def _put(self, node: fx.Node, made: fx.Node, form: Form) -> None:
        self.form[node] = form
        self.made[node, form] = made

    def _as(self, node: fx.Node, form: Form) -> fx.Node:
        """A value in another form; a conversion is written once."""
        while node in self.changed:
            node = self.changed[node]
        own = self.form[node]
        if own is Form.SHARED or own is form:
            return self.made[node, own]
        if own is Form.WEIGHT or form not in (Form.CHANNELS, Form.BATCH):
            raise PackError(f"{node.name} is used both as weights and as images")
        if (node, form) not in self.made:
            convert = layers.to_batch if form is Form.BATCH else layers.to_channels
            self.conversions.add((node, form))
            self.made[node, form] = self.graph.call_function(convert, (self.made[node, own], self.width))
        return self.made[node, form]

    def _forms(self, node: fx.Node) -> set[Form]:
        return {self.form[n] for n in node.all_input_nodes} - {Form.SHARED}

    def _copied(self, node: fx.Node, form: Form) -> None:
        """The same call on values in one form."""
        self._put(node, self.graph.node_copy(node, lambda old: self._as(old, form)), form)

    def _called(self, node: fx.Node, form: Form, function: Callable[..., Any], *args: Any) -> None:
        """A function that takes the width, on values in one form."""
        mapped = fx.map_arg(args, lambda old: self._as(old, form))
        self._put(node, self.graph.call_function(function, (*mapped, self.width)), form)

    def _per_branch(self, node: fx.Node, target: Any, scalars: frozenset[str] = frozenset()) -> None:
        """A call per branch, on images one after another and on weights."""
        images = bool(self._forms(node) & {Form.CHANNELS, Form.BATCH})
        flat, spec = tree_flatten((tuple(node.args), dict(node.kwargs)))
        forms, values = [], []
        for value in flat:
            if isinstance(value, fx.Node):
                own = self.form[value]
                forms.append(Form.BATCH if own is Form.CHANNELS else own)
                values.append(self._as(value, forms[-1]))
            else:
                forms.append(Form.SHARED)
                values.append(value)
        name = f"per_branch_{len(self.parts)}"
        self.parts[name] = _PerBranch(target, forms, spec, scalars)
        made = self.graph.call_module(name, (self.width, *values))
        self._put(node, made, Form.BATCH if images else Form.WEIGHT)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _get_attr(self, node: fx.Node) -> None:
        name = str(node.target)
        owner, _, key = name.rpartition(".")
        place = owner or "block"
        self.parts[place] = self.block.get_submodule(owner)
        if key.startswith("_tensor_constant"):  # the tracer's name for what stands nowhere else
            place, self.parts["constants"] = "constants", self.constants
            key = f"constant{len(self.constants._buffers)}"
            self.constants.register_buffer(key, getattr(self.block, name), persistent=False)
        # Read at run time: `.to(...)` puts another tensor in a buffer's place.
        tensor = self.graph.call_function(getattr, (self.graph.get_attr(place), key))
        if name not in self.packed_names:
            self._put(node, tensor, Form.SHARED)
        elif name in self.scalars:
            self._put(node, self.graph.call_method("rows", (self.width, tensor)), Form.WEIGHT)
        else:
            self._put(node, self.graph.call_method("stacked", (self.width, tensor)), Form.WEIGHT)

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.block.get_submodule(name)
        forms = self._forms(node)
        if _per_channel(module) and len(forms) <= 1 and Form.WEIGHT not in forms:
            self.parts[name] = module
            self._copied(node, next(iter(forms), Form.SHARED))
            return
        found = _layer(module)
        if found is not None and len(node.args) == 1 and not node.kwargs and forms and Form.WEIGHT not in forms:
            self.parts[name] = module
            form, function = found
            if function is layers.stochastic_depth and forms == {Form.BATCH}:
                self._copied(node, Form.BATCH)
                return
            before = set(self.conversions)
            mapped = self._as(node.args[0], form)
            made = self.graph.call_function(function, (self.graph.get_attr(name), mapped, self.width))
            if function is layers.linear:
                self.conversions = before  # cheap, and worth it: see `channelwise`
            self._put(node, made, form)
        elif next(state_of(module), None) is None and Form.WEIGHT not in forms:
            self.parts[name] = module
            self._copied(node, Form.BATCH if forms else Form.SHARED)
        else:
            inside = {n.removeprefix(f"{name}.") for n in self.scalars if n.startswith(f"{name}.")}
            self._per_branch(node, module, frozenset(inside))
            if forms - {Form.WEIGHT}:
                self.looped[name] = self.closed.get(name, f"{type(module).__name__} has no packed form")

    def _call_function(self, node: fx.Node) -> None:
        if node.target is getattr:
            self._attribute(node, node.args[1])
        elif node.target is operator.getitem:
            self._item(node)
        else:
            self._operation(node)

    def _call_method(self, node: fx.Node) -> None:
        if node.target in ("size", "dim", "numel", "get_device"):
            self._attribute(node, node.target)
        elif node.target in ("expand", "repeat") and self._spreads(node):
            sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            rule = layers.spread if node.target == "expand" else layers.repeated
            weight = self.made[node.args[0], Form.WEIGHT]
            mapped = fx.map_arg(tuple(sizes), lambda old: self._as(old, Form.SHARED))
            self._put(node, self.graph.call_function(rule, (weight, mapped, self.width)), Form.BATCH)
        else:
            self._operation(node)
            if str(node.target).endswith("_") and isinstance(node.args[0], fx.Node):
                self.changed[node.args[0]] = node

    def _spreads(self, node: fx.Node) -> bool:
        """Whether weights are given the size of the batch: their first size is then not a plain number."""
        if self._forms(node) != {Form.WEIGHT} or self.form[node.args[0]] is not Form.WEIGHT:
            return False
        sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return isinstance(sizes[0], fx.Node)

    def _attribute(self, node: fx.Node, name: Any) -> None:
        """What is asked about a tensor, not of it."""
        source = node.args[0]
        form = self.form[source]
        shape = name in ("shape", "size")
        if form is Form.CHANNELS and (shape or name == "numel"):
            sizes = self.graph.call_function(layers.shape_in_batch, (self.made[source, form], self.width))
        elif form is Form.WEIGHT and shape:
            whole = self.graph.call_function(getattr, (self.made[source, form], "shape"))
            sizes = self.graph.call_function(operator.getitem, (whole, slice(1, None)))
        elif form in (Form.SHARED, Form.BATCH) or (form is Form.CHANNELS and name in (*_ABOUT, "dim", "get_device")):
            made = self.graph.node_copy(node, lambda old: self._as(old, self.form[old]))
            about = shape or name in (*_ABOUT, "dim", "numel", "get_device")
            self._put(node, made, Form.SHARED if about else form)
            return
        elif form is Form.WEIGHT and name in ("dtype", "device", "requires_grad"):
            made = self.graph.node_copy(node, lambda old: self.made[old, Form.WEIGHT])
            self._put(node, made, Form.SHARED)
            return
        elif node.op == "call_function":
            self._per_branch(node, node.target)
            return
        else:
            self._operation(node)
            return
        if name == "size" and len(node.args) > 1:
            sizes = self.graph.call_function(operator.getitem, (sizes, node.args[1]))
        elif name == "numel":
            sizes = self.graph.call_method("numel", (sizes,))
        self._put(node, sizes, Form.SHARED)

    def _item(self, node: fx.Node) -> None:
        source = node.args[0]
        if isinstance(source, fx.Node) and source in self.tuples:
            self._copied(node, self.form[source])
        else:
            self._operation(node)

    def _operation(self, node: fx.Node) -> None:
        """A function or method: in channels if it can be, else per sample, else branch by branch."""
        forms = self._forms(node)
        if not forms:
            self._put(node, self.graph.node_copy(node, lambda old: self._as(old, Form.SHARED)), Form.SHARED)
        elif Form.WEIGHT in forms:
            self._operation_with_weights(node, forms)
        elif Form.CHANNELS in forms and self._stays_in_channels(node):
            pass
        else:
            self._copied(node, Form.BATCH)
        if _name(node) in ("split", "chunk", "unbind", "tensor_split"):
            self.tuples.add(node)

    def _operation_with_weights(self, node: fx.Node, forms: set[Form]) -> None:
        op = _BINARY.get(node.target)
        two = len(node.args) == 2 and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
        if len(forms) == 2 and op is not None and two and Form.SHARED not in [self.form[a] for a in node.args]:
            first = self.form[node.args[0]] is Form.WEIGHT
            form = self.form[node.args[1 if first else 0]]
            rule = layers.with_weights_of_channels if form is Form.CHANNELS else layers.with_weights
            values = [self.made[arg, self.form[arg]] for arg in node.args]
            self._put(node, self.graph.call_function(rule, (op.removeprefix("i"), *values, self.width, first)), form)
        else:
            self._per_branch(node, node.target)

    def _stays_in_channels(self, node: fx.Node) -> bool:
        """Write an operation that treats channels alike and apart; False if it is none."""
        name, images = _name(node), [n for n in node.all_input_nodes if self.form[n] is not Form.SHARED]
        plain = len(images) == len(node.all_input_nodes)
        if node.target in _BINARY and plain and len(images) == 1:
            self._copied(node, Form.CHANNELS)
        elif node.target in _BINARY and plain and len(node.args) == 2 and not node.kwargs:
            self._called(node, Form.CHANNELS, layers.broadcast_channels, _BINARY[node.target], *node.args)
        elif (node.target in _UNARY or name == "pad_same") and len(images) == 1:
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
