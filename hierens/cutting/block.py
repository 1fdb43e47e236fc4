"""`Block`: a graph of modules that can be pickled. Torch's own pickling traces it again, which mostly fails here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx, nn


class _Reference(NamedTuple):
    """Represents a node in a list of nodes."""

    name: str


class Block(fx.GraphModule):
    """A part of a backbone: modules under their own names, and the graph of their calls."""

    def __reduce__(self) -> Any:
        """The graph as a list of its nodes, and a module's state."""
        state = {name: self.__dict__[name] for name in vars(nn.Module()) if name in self.__dict__}
        return _rebuilt, (_listed(self.graph), state, type(self).__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The same in every protocol."""
        return self.__reduce__()

    def tapped(self, nodes: Sequence[str]) -> Block:
        """A block of the same modules that also returns the values of some nodes: `(*outputs, *values)`.

        Raises:
            ValueError: the graph has no such node.
        """
        rebuild, (listed, state, name) = self.__reduce__()
        if missing := set(nodes) - {node.name for node in self.graph.nodes}:
            raise ValueError(
                f"the layers that compute {min(missing)!r} were merged or removed: get feature maps from the model "
                "before fuse(), fold_norms() or prune_intermediate_layers()."
            )
        *before, (op, own, target, (value,), kwargs) = listed
        outputs = value if isinstance(value, tuple) and not isinstance(value, _Reference) else (value,)
        output = (*outputs, *map(_Reference, nodes))
        return rebuild([*before, (op, own, target, (output,), kwargs)], state, name)

    @property
    def returns_one(self) -> bool:
        """Whether the output is a single value."""
        return isinstance(self.graph.output_node().args[0], fx.Node)

    def ending_at(self, nodes: Sequence[str]) -> Block:
        """A block that ends at the last of some nodes, without the modules that it does not need.

        It has the same modules otherwise. The block itself is returned if not all of the nodes lie on the way.
        """
        *before, last = (node for node in self.graph.nodes if node.name in nodes)
        needed = {last}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        if not needed.issuperset(before):
            return self
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            if node in needed or node.op == "placeholder":
                made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(made[last])
        return Block(self, graph, class_name="Block")


def _listed(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as plain values."""

    def plain(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: _Reference(node.name))

    return [(node.op, node.name, node.target, plain(node.args), plain(node.kwargs)) for node in graph.nodes]


def _rebuilt(nodes: list[tuple[Any, ...]], state: dict[str, Any], name: str) -> Block:
    """A block from the values of `__reduce__`."""
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def known(value: Any) -> Any:
        if isinstance(value, _Reference):
            return made[value.name]
        if isinstance(value, (tuple, list)):
            return type(value)(map(known, value))
        if isinstance(value, dict):
            return {key: known(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(known(value.start), known(value.stop), known(value.step))
        return value

    for op, own, target, args, kwargs in nodes:
        made[own] = graph.create_node(op, target, known(args), known(kwargs), own)
    root = nn.Module()
    root.__dict__.update(state)
    block = Block(root, graph, class_name=name)
    block.__dict__.update(state)
    return block
