"""`Packed`: runs a block for several branches in one call, by rewriting its trace.

The block is traced to single layers. Convolutions and other operations per channel have the branches side by side in
channels. Per-sample operations have them one after another in the batch. A layer that allows neither is called once per
branch, in its place, while the rest of the block runs in one call. Conversions are inserted where the form changes.
Packing is optional: `hierens.branches.self_check.self_check` verifies it, and a block that cannot be traced is looped.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any

from timm.models import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn

from hierens.branches.layer_forms import TRACED, PackError, layer_form, per_channel
from hierens.branches.light import LightLayer
from hierens.branches.rewrite import Rewriter
from hierens.branches.tensors import BranchSlice, Layers, caches_of, clear_caches
from hierens.core.errors import first_line

_MAX_UNTRACEABLE = 40  # modules per block
_TRACING = threading.RLock()  # tracing temporarily replaces functions of torch


class Packed:
    """The packed form of a block in the current modes of its modules.

    Attributes:
        looped: modules that are called once per branch on images, with the reasons.
        per_branch: these modules, and those that are called once per branch without images.
        channelwise: whether branches stay side by side in channels, except before a last linear layer.
    """

    def __init__(self, layers: Layers, closed: Mapping[str, str] = {}, unchecked: Container[str] = ()) -> None:
        """Rewrite a block.

        Args:
            layers: the block's layers, with the tensors of all branches.
            closed: modules to be called unchanged, once per branch, with the reasons.
            unchecked: those of `closed` that differ from the modules with which the grouped form was checked.

        Raises:
            PackError: the block cannot be traced to its layers, or returns something other than tensors.
        """
        skeleton, all_closed = skeleton_of(layers.block, closed), dict(closed)
        rewriter = Rewriter(layers, traced(skeleton, all_closed), skeleton, all_closed, unchecked)
        self._graph = rewriter.rewrite()
        self.looped, self.per_branch = rewriter.looped, frozenset(rewriter.per_branch)
        self.channelwise = rewriter.packed.channelwise

    def __call__(self, values: Tensor | tuple[Tensor, ...], width: BranchSlice) -> Any:
        """The block's outputs for the branches, given the parents' outputs, both side by side in channels."""
        return self._graph(*(values if isinstance(values, tuple) else (values,)), width)


def skeleton_of(block: nn.Module, closed: Container[str] = ()) -> Any:
    """A copy of a block with the same tensors, to be traced: tracing changes modules.

    Modules in `closed` are the block's own.
    """
    memo: dict[int, Any] = {id(module): module for name, module in block.named_modules() if name in closed}
    for part in block.modules():
        memo.update((id(tensor), tensor) for tensor in (*part._parameters.values(), *part._buffers.values()))
    return copy.deepcopy(block, memo)


class _FineTracer(fx.Tracer):
    """Traces into every module except those with a packed form, in `closed`, in `torch.nn`, or untraceable in timm.

    While it traces, torch passes it every call of a module in the process; calls of other threads run normally.
    """

    def __init__(self, closed: Container[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed, self.failed, self.thread = closed, "", threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        packed = layer_form(m) is not None or per_channel(m)
        if packed or isinstance(m, LightLayer) or module_qualified_name in self.closed:
            return True
        if isinstance(m, (nn.Sequential, fx.GraphModule)):
            return False
        return type(m).__module__.startswith("torch.nn") or (is_notrace_module(type(m)) and type(m) not in TRACED)

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
    """A trace of a block; modules that cannot be traced are not entered, and added to `closed` with the reasons."""
    caches = caches_of(block)
    with _TRACING:
        for _ in range(_MAX_UNTRACEABLE):
            tracer = _FineTracer(closed)
            clear_caches(caches)
            try:
                return tracer.trace(block)
            except Exception as error:
                if not tracer.failed or tracer.failed in closed:
                    raise PackError(f"it cannot be traced layer by layer: {first_line(error)}") from error
                closed[tracer.failed] = f"cannot be traced: {first_line(error)}"
    raise PackError(f"more than {_MAX_UNTRACEABLE} of its modules cannot be traced")
