"""`PerBranch`: a call in the packed graph that is made once per branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only, tree_unflatten

from hierens.branches.layer_forms import Form
from hierens.branches.tensors import BranchSlice


class PerBranch(nn.Module):
    """Calls a function, a method or each branch's module once per branch, and combines the results."""

    def __init__(self, target: Any, forms: Sequence[Form], spec: Any) -> None:
        """A call.

        Args:
            target: a function, the name of a method, or a list with a module per branch (which is not registered).
            forms: of the flattened arguments.
            spec: of the flattened arguments, from `tree_flatten`.
        """
        super().__init__()
        self.target, self.forms, self.spec = target, list(forms), spec
        self.changes_inputs = isinstance(target, list) and change_in_place(target)

    def forward(self, width: BranchSlice, *flat: Any) -> Any:
        """The results, one after another in the batch if any argument has a batch, else stacked."""
        split = [self._split(value, form, width) for value, form in zip(flat, self.forms, strict=True)]
        if self.changes_inputs:  # autograd forbids changes in place of several views of one tensor
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
        return self._combined(results)

    @staticmethod
    def _split(value: Any, form: Form, width: BranchSlice) -> Sequence[Any]:
        if form is Form.WEIGHT and isinstance(value, Tensor):
            return value.unbind()
        if form is Form.BATCH and isinstance(value, Tensor):
            return value.unflatten(0, (width.active, -1)).unbind()
        return [value] * width.active

    def _combined(self, results: list[Any]) -> Any:
        if isinstance(results[0], (tuple, list)):
            return tuple(self._combined(list(parts)) for parts in zip(*results, strict=True))
        if not isinstance(results[0], Tensor):
            return results[0]
        return torch.cat(results) if Form.BATCH in self.forms else torch.stack(results)


def change_in_place(modules: Sequence[nn.Module]) -> bool:
    """Whether any of these modules may change its inputs in place."""
    return any(getattr(part, "inplace", False) for module in modules for part in module.modules())
