"""Files of the first layout of saved models, in which a level's weights were packed along dim 0, under `block.`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hierens.branches.executor import AnyLevel
from hierens.branches.tensors import concatenate, state_of

_PACKED = re.compile(r"(networks\.)?(levels\.\d+|head|classifier)\.block\.")


def in_first_layout(names: Iterable[str]) -> bool:
    """Whether tensors have the names of the first layout."""
    return any(_PACKED.match(name) for name in names)


def first_layout(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name, in the first layout."""
    state = dict(model.state_dict())
    for prefix, level in model.named_modules():
        if isinstance(level, AnyLevel) and isinstance(level, nn.ModuleList):  # not of a fused model
            for name, _ in state_of(level[0]):
                own = [state.pop(key) for b in range(len(level)) if (key := f"{prefix}.{b}.{name}") in state]
                state[f"{prefix}.block.{name}"] = own[0] if len(own) == 1 else concatenate(own)
    return state


def rename_packed(branches: Sequence[nn.Module], state: dict[str, Any], prefix: str) -> None:
    """Rename, in place, a level's tensors from the first layout to today's names.

    Args:
        branches: of the level.
        state: tensors by name; those of other levels are left.
        prefix: of the names of this level's tensors.
    """
    for name, own in state_of(branches[0]):
        packed = state.get(f"{prefix}block.{name}")
        if packed is None or (packed.ndim and packed.shape[0] % len(branches)):
            continue  # of another model: loading raises an error
        parts = [packed] if len(branches) == 1 else packed.chunk(len(branches))
        del state[f"{prefix}block.{name}"]
        for branch, tensor in enumerate(parts):
            state[f"{prefix}{branch}.{name}"] = tensor.view(()) if own.ndim == 0 else tensor
