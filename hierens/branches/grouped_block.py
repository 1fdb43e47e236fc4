"""A block run for all its branches at once, by rewriting its trace.

The block is traced down to single layers. Convolutions and all that works per channel keep the branches side by side
in channels; whatever works per sample takes them one after another in the batch; a layer for which neither can be done
is called once per branch, in place, while the rest of the block stays packed. Where the form changes, a conversion is
written into the graph. Packing is an optimisation, never a need: `hierens.branches.check.self_check` says whether it
is right, and a block that cannot be traced to its layers is looped as a whole.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any

from timm.models import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn

from hierens.branches.rewrite import Layers, Rewriter
from hierens.branches.rules import OPENED, Form, PackError, layer_form, per_channel
from hierens.branches.tensors import BranchSlice, caches_of, forget
from hierens.core.errors import first_line

_MOST_CLOSED = 40  # modules of a block that may be left whole because they cannot be traced
_TRACING = threading.RLock()  # a tracer puts functions of its own in torch's place


class Packed:
    """The packed form of a block in the mode in which its modules are.

    Attributes:
        looped: modules that are called once per branch, in place, and why.
        apart: those, and those that are called so without images.
        channelwise: whether no feature map changes its form but into a last linear layer.
    """

    def __init__(self, layers: Layers, closed: Mapping[str, str] = {}, unlike: Container[str] = ()) -> None:
        """Rewrite a block.

        Args:
            layers: the block's layers, with the tensors of all branches.
            closed: modules to call as they are, once per branch, and why.
            unlike: those of them that are so because they are not what the block's form was checked with.

        Raises:
            PackError: the block cannot be traced to its layers, or hands on something other than tensors.
        """
        skeleton, all_closed = skeleton_of(layers.block, closed), dict(closed)
        rewriter = Rewriter(layers, traced(skeleton, all_closed), skeleton, all_closed, unlike)
        self._graph = rewriter.rewrite()
        self.looped, self.apart = rewriter.looped, frozenset(rewriter.apart)
        self.channelwise = not any(form is Form.BATCH for _, form in rewriter.conversions)

    def __call__(self, values: Tensor | tuple[Tensor, ...], width: BranchSlice) -> Any:
        """What the block returns for the branches, all side by side, given what the parents handed on, side by side."""
        return self._graph(*(values if isinstance(values, tuple) else (values,)), width)


def skeleton_of(block: nn.Module, closed: Container[str] = ()) -> Any:
    """The modules of a block once more, with the same tensors: what tracing does to modules, it does to these.

    Modules that stay closed are the block's own.
    """
    memo: dict[int, Any] = {id(module): module for name, module in block.named_modules() if name in closed}
    for part in block.modules():
        memo.update((id(tensor), tensor) for tensor in (*part._parameters.values(), *part._buffers.values()))
    return copy.deepcopy(block, memo)


class _FineTracer(fx.Tracer):
    """Opens every module but those with a packed form, torch's and timm's own untraceable ones, and those `closed`.

    While it traces, torch hands it every call of a module in the process: those of other threads it passes on.
    """

    def __init__(self, closed: Container[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed, self.failed, self.thread = closed, "", threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if layer_form(m) is not None or per_channel(m) or module_qualified_name in self.closed:
            return True
        if isinstance(m, (nn.Sequential, fx.GraphModule)):
            return False
        return type(m).__module__.startswith("torch.nn") or (is_notrace_module(type(m)) and type(m) not in OPENED)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def traced(block: fx.GraphModule, closed: dict[str, str]) -> fx.Graph:
    """A trace in which modules that cannot be traced were left whole (and added to `closed`, with why)."""
    caches = caches_of(block)
    with _TRACING:
        for _ in range(_MOST_CLOSED):
            tracer = _FineTracer(closed)
            forget(caches)
            try:
                return tracer.trace(block)
            except Exception as error:
                if not tracer.failed or tracer.failed in closed:
                    raise PackError(f"it cannot be traced layer by layer: {first_line(error)}") from error
                closed[tracer.failed] = f"cannot be traced: {first_line(error)}"
    raise PackError(f"more than {_MOST_CLOSED} of its modules cannot be traced")
