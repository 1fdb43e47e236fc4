"""`Level`: one block in several copies, each an ordinary module.

At conversion, `hierens.branches.self_check.self_check` compares the grouped executor with the loop. If they differ, the
block is looped. The grouped form is derived from the current modules of the branches, and is not used if it would not
reproduce their behaviour (`hierens.branches.grouped_form`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hierens.branches.executor import AnyLevel
from hierens.branches.grouped_form import GroupedForm, class_of
from hierens.branches.legacy_layout import rename_packed
from hierens.branches.light import FACTORS, factor_names, light_layers, merge, shared_names, tie
from hierens.branches.tensors import BranchSlice, make_contiguous, state_of
from hierens.core.block_values import Value

_MAX_FORMS = 3  # kept per level: for evaluation, for training, and for training with some layers frozen
_FORM_LOCK = threading.RLock()


class Level(AnyLevel, nn.ModuleList):
    """One block in several copies, each an ordinary module: `level[branch]`.

    The branches' tensors of each layer are adjacent in memory where possible, so that a grouped call need not copy
    them. Each is an ordinary tensor nevertheless. Branches with light layers (`hierens.branches.light`) hold the same
    weights, which `state_dict`, like `parameters`, lists once: in the first branch.
    """

    def __init__(self, branches: Iterable[nn.Module], flat: Mapping[str, Tensor] | None = None) -> None:
        """A level that takes over these branches: copies of one block, each with its own weights.

        Args:
            branches: the modules.
            flat: what `make_contiguous` returned for them, if it was called.
        """
        super().__init__(branches)
        self.executor, self.fallback_reason, self.plan = "auto", "", {}
        self.size = sum(tensor.numel() for _, tensor in state_of(self[0]))
        self.known = {name: class_of(module) for name, module in self[0].named_modules()}
        self._forms: list[GroupedForm] = []
        self._flat: dict[str, Tensor] = dict(flat or {})
        self.make_contiguous()

    @classmethod
    @torch.no_grad()
    def of_copies(cls, block: nn.Module, count: int, state: Callable[[int], Mapping[str, Tensor]]) -> Level:
        """A level of copies of a block, allocated contiguously: no second copy of the weights is needed meanwhile.

        Args:
            block: the block; it is not changed. Weights of its light layers are shared, with the first branch's values.
            count: number of branches.
            state: returns the weights of a branch, by the block's own names.
        """
        branches = [sharing_tensors(block) for _ in range(count)]
        tie(branches)
        flat = make_contiguous(branches, {})
        for index, branch in enumerate(branches):
            values, own = state(index), dict(state_of(branch))
            contiguous = {id(own[name]) for name in flat}  # also under the other names of a tied tensor
            shared = shared_names(branch) if index else set()
            for name, tensor in own.items():
                if name in shared:
                    continue
                if id(tensor) not in contiguous:
                    tensor.data = tensor.clone()
                tensor.copy_(values[name])
        return cls(branches, flat)

    @property
    def branches(self) -> int:
        """Number of branches."""
        return len(self)

    def run_branch(self, branch: int, value: Value) -> Value:
        """Run a single branch."""
        return self[branch](*value) if isinstance(value, tuple) else self[branch](value)

    def first(self) -> Any:
        """See `AnyLevel.first`."""
        return self[0]

    def grouped_form(self, start: int = 0, stop: int | None = None) -> Callable[[Value, BranchSlice], Value] | None:
        """See `AnyLevel.grouped_form`."""
        form = self._form(start, stop)
        if form is None or form.packed is None or torch_module._has_any_global_hook():
            return None
        if not form.contiguous and (form.updates_statistics or self.executor != "grouped"):
            return None  # updates of running statistics would be lost with tensors concatenated for one call
        return form.packed

    def _form(self, start: int = 0, stop: int | None = None) -> GroupedForm | None:
        """The grouped form of the current branches; while compiling, the one found last."""
        if torch.compiler.is_compiling():
            return self._forms[0] if self._forms else None
        forms = self._forms
        if forms and forms[0].is_current(start, stop):
            return forms[0]
        with _FORM_LOCK:
            found = next((form for form in forms if form.is_current()), None)
            found = found or GroupedForm(list(self), self.known, self._flat)
            self._forms = [found, *(form for form in forms if form is not found)][:_MAX_FORMS]
        return found

    @property
    def contiguous(self) -> bool:
        """Whether the branches' tensors are adjacent in memory."""
        return not torch.compiler.is_compiling() and bool(self._forms) and self._forms[0].contiguous

    def group(self) -> None:
        """Find the grouped form now; `fallback_reason` says why there is none."""
        form = self._form() if self.branches > 1 else None
        self.fallback_reason = form.reason if form else ""

    @property
    def channelwise(self) -> bool:
        """See `AnyLevel.channelwise`."""
        form = self._forms[0] if self._forms else self._form()  # a former one will do: it only guides a choice
        return bool(form and form.packed and form.packed.channelwise)

    @property
    def looped_layers(self) -> dict[str, str]:
        """Modules that a grouped call calls once per branch, with the reasons."""
        form = self._form() if self.grouped else None
        return form.packed.looped if form and form.packed else {}

    def first_branches(self, branches: int) -> Level:
        """See `AnyLevel.first_branches`."""
        copies = copy.deepcopy([self[branch] for branch in range(branches)])
        if branches == 1 and self.light:
            merge(copies[0])
            level = Level(copies)
        else:
            level = Level(copies)
            level.fallback_reason, level.known = self.fallback_reason, self.known
        level.executor, level.training = self.executor, self.training
        return level

    @property
    def light(self) -> list[str]:
        """The names of the layers whose weights all branches share."""
        return [name for name, _ in light_layers(self[0])]

    @property
    def full(self) -> list[str]:
        """The names of the parameters with two or more dimensions of which every branch has its own."""
        shared = shared_names(self[0]) | factor_names(self[0])
        return [name for name, value in self[0].named_parameters() if value.ndim > 1 and name not in shared]

    def parameters_of(self, branches: int) -> int:
        """See `AnyLevel.parameters_of`."""
        factors = sum(factor.numel() for _, layer in light_layers(self[0]) for factor in layer.factors().values())
        return super().parameters_of(branches) - (factors if branches == 1 else 0)

    def make_contiguous(self) -> None:
        """Store the branches' tensors of each layer one after another in memory, where possible."""
        self._flat = make_contiguous(list(self), self._flat)

    def replace(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Replace the module called `name` in every branch, by one of `modules` each."""
        owner, _, key = name.rpartition(".")
        for branch, module in zip(self, modules, strict=True):
            setattr(branch.get_submodule(owner), key, module)
        tie(list(self))
        self.make_contiguous()

    def reorder(self, sources: Sequence[int]) -> None:
        """Move branch `sources[i]` to position i, for every i."""
        branches = [self[source] for source in sources]
        for place, branch in enumerate(branches):
            self[place] = branch
        self.make_contiguous()

    # --- torch's operations on modules --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Level:
        """Set the mode and find its grouped form now, since it cannot be found while compiling."""
        super().train(mode)
        if self.branches > 1 and self.grouped and not self.is_meta:
            self._form()
        return self

    @property
    def is_meta(self) -> bool:
        """Whether there are parameters without values."""
        return any(parameter.is_meta for parameter in self.parameters())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Level:
        super()._apply(fn, recurse)
        tie(list(self))  # tensors that leave the meta device are new ones in every branch
        self.make_contiguous()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is derived from the branches."""
        return {**self.__dict__, "_forms": [], "_flat": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.make_contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> Level:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return other

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As for every module; a weight that branches share is listed once, in the first branch."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, branch in self._repeated():
            state.pop(f"{prefix}{branch}.{name}", None)
        return state

    def _repeated(self) -> Iterator[tuple[str, int]]:
        """The names of shared weights, with each branch but the first."""
        return ((name, branch) for name in sorted(shared_names(self[0])) for branch in range(1, len(self)))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rename_packed(list(self), state_dict, prefix)
        for name, branch in self._repeated():
            first, own = f"{prefix}0.{name}", f"{prefix}{branch}.{name}"
            weight, other = state_dict.get(first), state_dict.get(own)
            if weight is None:  # left out on purpose, for example of another number of classes: factors belong to it
                owner = name.removesuffix("weight")
                for key in (f"{prefix}{b}.{owner}{factor}" for b in range(len(self)) for factor in FACTORS):
                    state_dict.pop(key, None)
                continue
            if other is not None and other is not weight and not torch.equal(other, weight):
                error_msgs.append(f"{own} differs from {first}, and these branches share one weight.")
            if local_metadata.get("assign_to_params_buffers") and not isinstance(weight, nn.Parameter):
                weight = state_dict[first] = nn.Parameter(weight)
            state_dict[own] = weight
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@torch.no_grad()
def sharing_tensors(block: nn.Module) -> nn.Module:
    """A copy of a block whose parameters and persistent buffers share the block's memory."""
    memo: dict[int, Any] = {}
    for _, tensor in state_of(block):
        if type(tensor) is nn.Parameter and not tensor.is_inference():
            memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
        elif type(tensor) is Tensor and not tensor.is_inference():
            memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(block, memo)
