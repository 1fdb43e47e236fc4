"""Counts multiply-accumulates on a copy of a model without values, so the model can be used meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

# A module's dictionaries of hooks, and the caches in which some attention layers keep values of their weights.
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if name.endswith("_hooks") and isinstance(value, dict))
_CACHE = "bias_cache"


class MacCounter(FlopCounterMode):
    """Torch's counter of operations without its hooks, which it sets for every module in every thread."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoHooks()

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2


class _NoHooks(ModuleTracker):
    def __enter__(self) -> _NoHooks:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def count_macs(module: Any, size: Sequence[int], run: Callable[[Any, Tensor], Iterator[Any]]) -> tuple[int, ...]:
    """Multiply-accumulates of each step of a run, for one image, in evaluation mode.

    Nothing is computed, unless a module needs values.

    Args:
        module: the module to run; it is not changed, and other threads may use it.
        size: of the image, (C, H, W).
        run: called with a copy of the module and an image (1, C, H, W); yields after each step.
    """
    like = next(module.parameters())
    try:
        return _counted(_copied(module, _without_values), torch.zeros(1, *size, dtype=like.dtype, device="meta"), run)
    except Exception:  # a module may need values; a real error occurs again below
        if like.is_meta:
            raise
    return _counted(_copied(module, _alias), torch.zeros(1, *size, dtype=like.dtype, device=like.device), run)


@torch.inference_mode(False)
@torch.no_grad()
def _counted(module: Any, image: Tensor, run: Callable[[Any, Tensor], Iterator[Any]]) -> tuple[int, ...]:
    with MacCounter() as counter:
        totals = [0, *(counter.macs for _ in run(module, image))]
    return tuple(after - before for before, after in pairwise(totals))


@torch.no_grad()
def _copied(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in evaluation mode, without hooks and caches; `change` maps its tensors."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in [*vars(part).items()]:
            if name in _HOOKS or (isinstance(value, dict) and name.endswith(_CACHE)):
                memo[id(value)] = type(value)()
        for owner in (part._parameters, part._buffers, vars(part)):
            for tensor in [*owner.values()]:
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = _of_same_class(tensor, change(tensor))
    return copy.deepcopy(module, memo).eval()


def _of_same_class(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _alias(tensor: Tensor) -> Tensor:
    """A parameter is only read, so its memory is shared; a buffer may be written, so it is copied."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
