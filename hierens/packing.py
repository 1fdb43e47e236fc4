"""A block run for all its branches at once, by rewriting its trace for packed weights.

The block is traced down to single layers. Convolutions and all that works per channel keep the branches side by side
in channels; whatever works per sample takes them one after another in the batch; a layer for which neither can be done
is called once per branch, in place, while the rest of the block stays packed. Where the form changes, a conversion is
written into the graph. Packing is an optimisation, never a need: `hierens.checking.self_check` says whether it is
right, and a block that cannot be traced to its layers is looped as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from timm.models import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn

from hierens.errors import first_line
from hierens.modes import in_mode
from hierens.packed import Width, caches_of, forget
from hierens.packing_rules import OPENED, Form, PackError, layer_form, per_channel
from hierens.rewriting import Rewriter

_MOST_CLOSED = 40  # modules of a block that may be left whole because they cannot be traced


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
        traces = [traced(block, mode, closed) for mode in (False, True)]
        rewriters = [Rewriter(block, trace, scalars, constants, closed) for trace in traces]
        graphs = [rewriter.rewrite() for rewriter in rewriters]
        same = str(graphs[0].code) == str(graphs[1].code)
        self._graphs = [graphs[0], graphs[0] if same else graphs[1]]
        self.looped = rewriters[0].looped
        self.channelwise = not any(form is Form.BATCH for _, form in rewriters[0].conversions)

    def __call__(self, values: Tensor | tuple[Tensor, ...], width: Width, training: bool) -> Any:
        """What the block returns for the branches, all side by side, given what the parents handed on, side by side."""
        return self._graphs[training](*(values if isinstance(values, tuple) else (values,)), width)


class _FineTracer(fx.Tracer):
    """Opens every module but those with a packed form, torch's and timm's own untraceable ones, and those `closed`."""

    def __init__(self, closed: Container[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed, self.failed = closed, ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if layer_form(m) is not None or per_channel(m) or module_qualified_name in self.closed:
            return True
        if isinstance(m, (nn.Sequential, fx.GraphModule)):
            return False
        return type(m).__module__.startswith("torch.nn") or (is_notrace_module(type(m)) and type(m) not in OPENED)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def traced(block: fx.GraphModule, training: bool, closed: dict[str, str]) -> fx.Graph:
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
