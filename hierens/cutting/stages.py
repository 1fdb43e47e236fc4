"""The stages of a backbone: the values in its trace that its own `forward_intermediates` returns as feature maps.

The backbone's `forward` and `forward_intermediates` are traced alike. Values of both traces are the same if the same
operations compute them from the images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from hierens.core.block_values import Value
from hierens.cutting.block import Block
from hierens.cutting.fx_tracer import coarse_graph, dropouts_as_modules


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage of a network, which ends in a feature map.

    Attributes:
        info: timm's description of the map: its channels (`num_chs`), `reduction` and `module`.
        level: index of the block that computes it.
        node: name of the node in that block's graph; empty for the block's output.
        to_map: the map (N, C, H, W), computed from the images and the value of the node.
        normed: whether timm's `norm=True` would change the map.
    """

    info: dict[str, Any]
    level: int
    node: str
    to_map: Callable[[Tensor, Value], Tensor]
    normed: bool = False


def find_stages(
    backbone: nn.Module, opened: set[str], features: Mapping[fx.Node, int], edges: Sequence[int]
) -> tuple[Stage, ...]:
    """The stages of a backbone's own `forward_intermediates`; none if its maps are not computed in its blocks.

    Args:
        backbone: the backbone.
        opened: the modules that its trace enters.
        features: the nodes of the trace that hold features, with their positions.
        edges: the positions at which blocks begin, and the end of the last one.
    """
    infos = getattr(backbone, "feature_info", None)
    if not isinstance(infos, list) or not features or not hasattr(backbone, "forward_intermediates"):
        return ()
    own, keys = dict[int, fx.Node](), dict[Any, int]()
    for node, key in _keys(next(iter(features)).graph.nodes, keys).items():
        if edges[0] <= features.get(node, -1) < edges[-1]:
            own.setdefault(key, node)
    try:
        plain, normed = (_Ends(backbone, opened, keys, own, norm) for norm in (False, True))
        return tuple(
            Stage(
                dict(info),
                bisect_right(edges, features[source := plain.source(end)]) - 1,
                source.name,
                plain.conversion(end),
                normed.source(other) is not source,
            )
            for info, end, other in zip(infos, plain.maps, normed.maps, strict=True)
        )
    except Exception:  # its control flow depends on values, or its maps on values that the forward pass does not have
        return ()


def _keys(nodes: Iterable[fx.Node], known: dict[Any, int]) -> dict[fx.Node, int]:
    """A number for every node; nodes have the same number if the same operations compute them.

    Args:
        nodes: of a trace, in order.
        known: numbers of other traces; new ones are added.
    """
    found: dict[fx.Node, int] = {}
    for node in nodes:
        arguments = repr(fx.map_arg((node.args, node.kwargs), lambda old: f"%{found[old]}"))
        target = "" if node.op == "placeholder" else node.target
        found[node] = known.setdefault((node.op, target, arguments), len(known))
    return found


class _Ends:
    """The maps in a trace of `forward_intermediates`, and the values of the backbone's forward pass they come from."""

    def __init__(
        self, backbone: nn.Module, opened: set[str], keys: dict[Any, int], own: Mapping[int, fx.Node], norm: bool
    ) -> None:
        graph = coarse_graph(backbone, opened, "forward_intermediates", {"norm": norm})
        dropouts_as_modules(graph, set(dict(backbone.named_modules())))
        *nodes, output = graph.nodes
        self.keys, self.own = _keys(nodes, dict(keys)), own
        self.maps: list[fx.Node] = list(output.args[0][1])

    def source(self, node: fx.Node) -> fx.Node:
        """The value of the forward pass that a map is computed from; with `norm`, the map's node if there is none."""
        found, seen = set[fx.Node](), {node}
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if (own := self.own.get(self.keys[node])) is not None:
                found.add(own)
            elif node.op in ("call_module", "get_attr"):
                found.add(node)
            else:
                waiting += set(node.all_input_nodes) - seen
                seen.update(node.all_input_nodes)
        (source,) = found
        return source

    def conversion(self, node: fx.Node) -> Block:
        """The operations that compute a map from the images and its source."""
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        images, value = graph.placeholder("images"), graph.placeholder("value")

        def copied(old: fx.Node) -> fx.Node:
            if old.op == "placeholder":
                return images
            if self.keys[old] in self.own:
                return value
            if old not in made:
                made[old] = graph.node_copy(old, copied)
            return made[old]

        graph.output(copied(node))
        return Block(nn.Module(), graph, class_name="ToMap")
