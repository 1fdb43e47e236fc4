"""The tensors of several branches as one: adjacent in memory, or permanently packed in a fused model.

Packed tensors hold the branches' values concatenated along dim 0, so the tensor of the first w branches is a view. A
value without dimensions, such as batch norm's counter, becomes a vector with an entry per branch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

# The types that DLPack can transfer; through it, a part of a storage becomes a storage of its own.
_DLPACK_TYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


@dataclass(frozen=True)
class BranchSlice:
    """The branches of a call: `active` of `total`, beginning with `start`; `siblings` of them share each input.

    `contiguous` says whether the tensors of ordinary branches are adjacent in memory (see `make_contiguous`).
    """

    active: int
    total: int
    start: int = 0
    siblings: int = 1
    contiguous: bool = True

    @property
    def parents(self) -> int:
        """Number of inputs."""
        return self.active // self.siblings

    def rows(self, packed: Tensor | None) -> Any:
        """The active branches' part of a packed tensor, as a view."""
        if packed is None or self.active == self.total:
            return packed
        rows = packed.shape[0] // self.total
        return packed[rows * self.start : rows * (self.start + self.active)]

    def chosen(self, per_branch: Sequence[Any]) -> Sequence[Any]:
        """The active branches' part of a sequence with an entry per branch."""
        return per_branch[self.start : self.start + self.active]


class Layer(Protocol):
    """A layer of several branches, whose tensors a grouped call reads as one.

    Attributes:
        module: one branch's layer, or the packed layer; for everything that the branches have in common.
    """

    module: Any

    def rows(self, name: str, width: BranchSlice) -> Any:
        """The active branches' values of a parameter or buffer along dim 0, (w*O, ...); None if there is none."""

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """The same along a new dim 0, (w, ...)."""


class Layers(Protocol):
    """All layers of a level.

    Attributes:
        block: has the block's structure; values that all branches share are read from it.
    """

    block: nn.Module

    def layer(self, name: str) -> Layer:
        """A layer with the tensors of all branches."""

    def modules(self, name: str) -> list[nn.Module]:
        """The module of each branch."""

    def per_branch(self, name: str) -> bool:
        """Whether each branch has its own value of a tensor."""


class PackedLayer:
    """A layer with packed tensors, in a fused model."""

    def __init__(self, module: nn.Module, scalars: Container[str] = ()) -> None:
        """A layer; `scalars` names its tensors that have no dimensions in a single branch."""
        self.module, self.scalars = module, scalars

    def rows(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return width.rows(getattr(self.module, name))

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        rows = self.rows(name, width)
        return rows if rows is None or name in self.scalars else rows.unflatten(0, (width.active, -1))


class BranchLayer:
    """A layer of ordinary branches, one module per branch; a grouped call reads tensors derived from theirs."""

    def __init__(self, modules: Sequence[nn.Module], flat: Mapping[str, Tensor]) -> None:
        """A layer.

        Args:
            modules: of all branches.
            flat: what `make_contiguous` returned for the layer's tensors.
        """
        self.modules, self.module, self.flat = list(modules), modules[0], flat
        self._owners: dict[str, list[dict[str, Any]]] = {
            name: [getattr(module, kind) for module in self.modules]
            for kind in ("_parameters", "_buffers")
            for name in getattr(self.module, kind)
        }
        self._views: dict[tuple[str, bool, int, int], Tensor] = {}

    def rows(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return self._packed(name, width, concatenated=True)

    def stacked(self, name: str, width: BranchSlice) -> Any:
        """See `Layer`."""
        return self._packed(name, width, concatenated=False)

    def _packed(self, name: str, width: BranchSlice, concatenated: bool) -> Tensor | None:
        key = (name, concatenated, width.start, width.active)
        if width.contiguous and not torch.is_grad_enabled():
            view = self._views.get(key)
            if view is not None:
                return view
        tensors = [owner[name] for owner in width.chosen(self._owners[name])]
        if tensors[0] is None:
            return None
        concatenated = concatenated and tensors[0].ndim > 0
        if not width.contiguous or name not in self.flat:
            return torch.cat(tensors) if concatenated else torch.stack(tensors)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = _view(self.flat[name], width, concatenated)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _PackedView.apply(view, concatenated, *tensors)
        return view


class _PackedView(torch.autograd.Function):
    """A view of the memory of adjacent tensors; backward returns their gradients as views."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, concatenated: bool, *tensors: Tensor) -> Tensor:
        ctx.concatenated, ctx.tensors = concatenated, tensors
        ctx.versions = [tensor._version for tensor in tensors]
        return view.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The view does not share the tensors' version counters, with which torch detects this for other layers.
        if [tensor._version for tensor in ctx.tensors] != ctx.versions:
            raise RuntimeError("weights needed for gradient computation have been modified by an inplace operation.")
        return None, None, *(gradient.chunk(len(ctx.tensors)) if ctx.concatenated else gradient.unbind())


def _view(flat: Tensor, width: BranchSlice, concatenated: bool) -> Tensor:
    """The active branches' part of a flat tensor, (w, ...), or concatenated along dim 0."""
    one, offset = flat[0], flat.storage_offset() + width.start * flat.stride(0)
    shape, strides = list(one.shape), list(one.stride())
    if concatenated:
        return flat.as_strided([shape[0] * width.active, *shape[1:]], [one.numel() // shape[0], *strides[1:]], offset)
    return flat.as_strided([width.active, *shape], [one.numel(), *strides], offset)


def are_contiguous(tensors: Sequence[Tensor], flat: Tensor | None) -> bool:
    """Whether tensors are still the parts of a flat tensor that `make_contiguous` returned."""
    if not tensors[0].numel():
        return True
    if flat is None or len(flat) != len(tensors) or flat.dtype is not tensors[0].dtype:
        return False
    return all(
        tensor.data_ptr() == part.data_ptr() and tensor.shape == part.shape and tensor.stride() == part.stride()
        for tensor, part in zip(tensors, flat.unbind(), strict=True)
    )


@torch.no_grad()
def make_contiguous(branches: Sequence[nn.Module], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store the branches' tensors of each layer one after another in memory; each stays an ordinary tensor.

    Each tensor has its own storage object, since other libraries treat tensors of one storage as tied weights. Tensors
    that are not alike (other shapes, types or devices, subclasses, shared with other processes) are left unchanged.

    Args:
        branches: the modules with the parameters and persistent buffers.
        known: what an earlier call returned.

    Returns:
        By name, the flat tensors: those of all branches as one, (branches, ...).
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
        if (before := known.get(name)) is not None and are_contiguous(tensors, before):
            found[name] = before
            continue
        strides = (first.numel(), *first.stride())
        flat = torch.empty_strided((len(tensors), *first.shape), strides, dtype=first.dtype, device=first.device)
        for tensor, part in zip(tensors, flat.unbind(), strict=True):
            part.copy_(tensor)
            tensor.data = from_dlpack(part)
        found[name] = flat
    return found


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return len({id(tensor) for tensor in tensors}) == len(tensors) and all(
        type(tensor) in (Tensor, nn.Parameter)
        and (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        == (first.shape, first.dtype, first.device, torch.strided)
        and tensor.dtype in _DLPACK_TYPES
        and not (tensor.is_meta or tensor.is_inference())
        and not (tensor.is_cpu and tensor.is_shared())
        and tensor.stride() == first.stride()
        and _is_dense(tensor)
        for tensor in tensors
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether there are no gaps between the tensor's values in memory."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 == tensor.numel()


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; branches share constants that are not saved."""
    for prefix, part in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield prefix + name, buffer


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Pack the branches' tensors into one."""
    tensors = list(tensors)
    return torch.stack(tensors) if tensors[0].ndim == 0 else torch.cat(tensors)


def replace(module: nn.Module, name: str, new: Tensor) -> None:
    """Replace a parameter or buffer."""
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    if (old := part._parameters.get(key)) is not None:
        part._parameters[key] = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    else:
        part._buffers[key] = new.detach()


def caches_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The attributes in which some attention layers cache values computed from their weights in evaluation mode."""
    return [
        (part, name)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, dict) and name.endswith("bias_cache")
    ]


def clear_caches(caches: Sequence[tuple[nn.Module, str]]) -> None:
    """Clear the caches that `caches_of` found."""
    for part, name in caches:
        getattr(part, name).clear()
