"""A coarse trace of a backbone's forward pass with `torch.fx`: most modules are leaves of the trace.

The root, plain `Sequential`s and the modules in `opened` are traced into. All others keep their names, training flags
and inner control flow, so one trace serves training and evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from timm.models import get_notrace_functions
from torch import fx, nn

from hierens.core.errors import first_line


class CutError(ValueError):
    """The backbone cannot be cut as requested."""


def coarse_graph(
    backbone: nn.Module, opened: set[str], method: str = "forward", arguments: Mapping[str, Any] = {}
) -> fx.Graph:
    """A coarse trace. If the backbone inspects a module's output, that module is opened as well.

    Args:
        backbone: the backbone.
        opened: names of the modules to enter.
        method: of the backbone, to be traced.
        arguments: of the method, besides the images.

    Raises:
        CutError: the backbone's own control flow depends on values.
    """
    opened = set(opened)
    while True:
        tracer = _CoarseTracer(opened, method, arguments)
        try:
            with _marked_features(backbone, tracer):
                return tracer.trace(backbone)
        except Exception as error:
            more = tracer.inspected - opened
            if not more:
                raise CutError(f"{type(backbone).__name__} cannot be traced: {first_line(error)}") from error
            opened |= more


class _Proxy(fx.Proxy):
    """Records the module whose output is written into by index, as only a list can be."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.record_inspected(self.node)  # type: ignore[attr-defined]
        raise TypeError(f"{self.node} is written into by index, which cannot be traced")


class _CoarseTracer(fx.Tracer):
    """Traces into plain Sequentials and opened modules only; calls the root with images and `arguments` only."""

    def __init__(self, opened: set[str], method: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.opened, self.traced_func_name, self.arguments = opened, method, arguments
        self.inspected: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened and type(m).forward is not nn.Sequential.forward

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        first = list(inspect.signature(root_fn).parameters)[1]
        return lambda root, x: root_fn(root, x, **self.arguments), [
            self.root,
            self.create_proxy("placeholder", first, (), {}),
        ]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        self.record_inspected(obj.node)
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.record_inspected(obj.node)
        return super().to_bool(obj)

    def record_inspected(self, node: fx.Node) -> None:
        """Record the last modules from which a value was computed whose length or truth is needed."""
        waiting, seen = [node], {node}
        while waiting:
            node = waiting.pop()
            if node.op == "call_module":
                self.inspected.add(str(node.target))
                continue
            new = set(node.all_input_nodes) - seen
            waiting += new
            seen |= new


def features_end() -> None:
    """Marks, in a trace, where the backbone's `forward_features` returns."""


@contextmanager
def _marked_features(backbone: nn.Module, tracer: fx.Tracer) -> Iterator[None]:
    original: Callable[..., Any] | None = getattr(backbone, "forward_features", None)
    if original is None:  # not a timm model: the features end where the classifier begins
        yield
        return

    def marked(*args: Any, **kwargs: Any) -> Any:
        features = original(*args, **kwargs)
        tracer.create_proxy("call_function", features_end, (), {})
        return features

    backbone.__dict__["forward_features"] = marked
    try:
        yield
    finally:
        del backbone.__dict__["forward_features"]


def dropouts_as_modules(graph: fx.Graph, taken: set[str]) -> dict[str, nn.Module]:
    """Replace `F.dropout`, whose mode the trace has fixed, by modules, which follow the model's mode.

    Args:
        graph: changed in place.
        taken: names that the modules must not have.

    Returns:
        The modules by name.
    """
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
    """All modules that contain one of the named modules: `a.b.c` gives `a` and `a.b`."""
    parts = (name.split(".") for name in names)
    return {".".join(path[:end]) for path in parts for end in range(1, len(path))}
