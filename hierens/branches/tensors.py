"""The tensors of several branches as one: side by side in a grouped call, and packed for good in a fused model.

Packed tensors hold the branches' values concatenated along dim 0, branch by branch, so that the first w branches are a
view. A value without dimensions, such as batch norm's counter, becomes a vector with an entry per branch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

# What DLPack hands over, by which a part of a storage becomes one of its own.
_LAID = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


@dataclass(frozen=True)
class BranchSlice:
    """Which of a level's branches run: `active` of `total`, from `start` on; each input feeds `siblings` of them.

    `laid` says whether the tensors of ordinary branches lie one after another in memory (see `lay`).
    """

    active: int
    total: int
    start: int = 0
    siblings: int = 1
    laid: bool = True

    @property
    def parents(self) -> int:
        """How many inputs there are."""
        return self.active // self.siblings

    def rows(self, packed: Tensor | None) -> Any:
        """The active branches' part, a view, of a packed tensor."""
        if packed is None or self.active == self.total:
            return packed
        rows = packed.shape[0] // self.total
        return packed[rows * self.start : rows * (self.start + self.active)]

    def chosen(self, per_branch: Sequence[Any]) -> Sequence[Any]:
        """The active branches' part of a sequence with an entry for each branch."""
        return per_branch[self.start : self.start + self.active]


class Layer(Protocol):
    """A layer of several branches, whose tensors a grouped call reads as one.

    Attributes:
        module: one branch's layer, or the packed one, for all that the branches have in common.
    """

    module: Any

    def rows(self, name: str, width: BranchSlice) -> Any:
        """The active branches' values of a parameter or buffer along dim 0, (w*O, ...); None if there is none."""

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """The same along a new dim 0, (w, ...)."""


class PackedLayer:
    """A layer with packed tensors, as in a fused model."""

    def __init__(self, module: nn.Module, scalars: Container[str] = ()) -> None:
        """A layer; `scalars` names those of its tensors that have no dimensions in a single branch."""
        self.module, self.scalars = module, scalars

    def rows(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return width.rows(getattr(self.module, name))

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        rows = self.rows(name, width)
        return rows if rows is None or name in self.scalars else rows.unflatten(0, (width.active, -1))


class Stack:
    """A layer of ordinary branches: each one's module. What a grouped call reads is derived from their tensors."""

    def __init__(self, modules: Sequence[nn.Module], wholes: Mapping[str, Tensor]) -> None:
        """A layer.

        Args:
            modules: of all branches.
            wholes: what `lay` returned for those tensors of the layer that lie together.
        """
        self.modules, self.module, self.wholes = list(modules), modules[0], wholes
        self._owners: dict[str, list[dict[str, Any]]] = {
            name: [getattr(module, kind) for module in self.modules]
            for kind in ("_parameters", "_buffers")
            for name in getattr(self.module, kind)
        }
        self._views: dict[tuple[str, bool, int, int], Tensor] = {}

    def rows(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return self._as_one(name, width, flat=True)

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return self._as_one(name, width, flat=False)

    def _as_one(self, name: str, width: BranchSlice, flat: bool) -> Tensor | None:
        key = (name, flat, width.start, width.active)
        if width.laid and not torch.is_grad_enabled():
            view = self._views.get(key)
            if view is not None:
                return view
        tensors = [owner[name] for owner in width.chosen(self._owners[name])]
        if tensors[0] is None:
            return None
        along = flat and tensors[0].ndim > 0
        if not width.laid or name not in self.wholes:
            return torch.cat(tensors) if along else torch.stack(tensors)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = _part(self.wholes[name], width, along)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _AsOne.apply(view, along, *tensors)
        return view


class _AsOne(torch.autograd.Function):
    """Tensors that lie one after another, as a view of the memory they share; gradients go back as views."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, along: bool, *tensors: Tensor) -> Tensor:
        ctx.along, ctx.tensors, ctx.versions = along, tensors, [tensor._version for tensor in tensors]
        return view.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The view does not share their version counters, by which torch tells this of any other layer.
        if [tensor._version for tensor in ctx.tensors] != ctx.versions:
            raise RuntimeError("weights needed for gradient computation have been modified by an inplace operation.")
        return None, None, *(gradient.chunk(len(ctx.tensors)) if ctx.along else gradient.unbind())


def _part(whole: Tensor, width: BranchSlice, along: bool) -> Tensor:
    """Some branches of what `lay` returned, (w, ...), or along dim 0."""
    one, offset = whole[0], whole.storage_offset() + width.start * whole.stride(0)
    shape, strides = list(one.shape), list(one.stride())
    if along:
        return whole.as_strided([shape[0] * width.active, *shape[1:]], [one.numel() // shape[0], *strides[1:]], offset)
    return whole.as_strided([width.active, *shape], [one.numel(), *strides], offset)


def are_laid(tensors: Sequence[Tensor], whole: Tensor | None) -> bool:
    """Whether tensors are the parts of what `lay` returned, still."""
    if not tensors[0].numel():
        return True
    if whole is None or len(whole) != len(tensors) or whole.dtype is not tensors[0].dtype:
        return False
    return all(
        tensor.data_ptr() == place.data_ptr() and tensor.shape == place.shape and tensor.stride() == place.stride()
        for tensor, place in zip(tensors, whole.unbind(), strict=True)
    )


@torch.no_grad()
def lay(branches: Sequence[nn.Module], wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the branches' tensors of each layer one after another in memory, each an ordinary tensor as before.

    Each keeps a storage of its own, for other libraries take tensors of one storage for tied. Where they are not of
    one kind (another shape, type or device, a subclass, shared with other processes) they are left as they are.

    Args:
        branches: whose parameters and persistent buffers are laid.
        wholes: what an earlier call returned.

    Returns:
        By name, the tensors of all branches as one, (branches, ...).
    """
    if len(branches) < 2 or torch.is_inference_mode_enabled():
        return {}
    found: dict[str, Tensor] = {}
    states = [dict(state_of(branch)) for branch in branches]
    done: set[int] = set()
    for name, first in states[0].items():
        tensors = [state[name] for state in states if name in state]
        if len(tensors) < len(states) or id(first) in done or not _are_alike(tensors):
            continue
        done.add(id(first))
        if (before := wholes.get(name)) is not None and are_laid(tensors, before):
            found[name] = before
            continue
        strides = (first.numel(), *first.stride())
        whole = torch.empty_strided((len(tensors), *first.shape), strides, dtype=first.dtype, device=first.device)
        for tensor, place in zip(tensors, whole.unbind(), strict=True):
            place.copy_(tensor)
            tensor.data = from_dlpack(place)
        found[name] = whole
    return found


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return len({id(tensor) for tensor in tensors}) == len(tensors) and all(
        type(tensor) in (Tensor, nn.Parameter)
        and (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        == (first.shape, first.dtype, first.device, torch.strided)
        and tensor.dtype in _LAID
        and not (tensor.is_meta or tensor.is_inference())
        and not (tensor.is_cpu and tensor.is_shared())
        and tensor.stride() == first.stride()
        and _is_dense(tensor)
        for tensor in tensors
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills the memory from its first to its last value."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 == tensor.numel()


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; constants that are not saved are no branch's own."""
    for prefix, part in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield prefix + name, buffer


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """One packed tensor out of each branch's."""
    tensors = list(tensors)
    return torch.stack(tensors) if tensors[0].ndim == 0 else torch.cat(tensors)


def replace(module: nn.Module, name: str, new: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer."""
    owner, _, key = name.rpartition(".")
    place = module.get_submodule(owner)
    if (old := place._parameters.get(key)) is not None:
        place._parameters[key] = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    else:
        place._buffers[key] = new.detach()


def caches_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where some attention layers keep, while evaluating, what they computed from their weights."""
    return [
        (part, name)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, dict) and name.endswith("bias_cache")
    ]


def forget(caches: Sequence[tuple[nn.Module, str]]) -> None:
    """Empty them."""
    for part, name in caches:
        getattr(part, name).clear()
