"""`GroupedForm`: the grouped form of ordinary branches, with a check whether it is still up to date.

The modules of a branch may be replaced, hooked, frozen, pruned or moved, as everywhere in torch. A grouped form is made
from the current modules, and used only while they are unchanged. A module that is not the same in all branches, or that
the self-check has not seen, is called once per branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import getitem, itemgetter
from typing import Any

from torch import Tensor, fx, nn

from hierens.branches.grouped_block import Packed
from hierens.branches.layer_forms import PackError, layer_form, per_channel
from hierens.branches.light import shared_names
from hierens.branches.tensors import BranchLayer, are_contiguous, state_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = (Tensor, nn.Parameter)
# Settings that follow from the shapes of tensors, which are compared themselves.
_BY_SHAPE = {
    *("in_channels", "out_channels", "kernel_size", "in_features", "out_features", "num_features", "num_channels"),
    *("transposed", "output_padding", "affine", "elementwise_affine"),
}
_PLAIN = (int, float, bool, str, type(None))


class BranchLayers:
    """The layers of several ordinary branches, as `hierens.branches.tensors.Layers`."""

    def __init__(self, branches: Sequence[nn.Module], flat: Mapping[str, Tensor]) -> None:
        self.branches, self.block, self.flat = list(branches), branches[0], flat
        self._own = {name for name, _ in state_of(self.block)}

    def layer(self, name: str) -> BranchLayer:
        """A layer with the tensors of all branches."""
        prefix = f"{name}." if name else ""
        own = {n.removeprefix(prefix): flat for n, flat in self.flat.items() if n.startswith(prefix)}
        return BranchLayer(self.modules(name), own)

    def modules(self, name: str) -> list[nn.Module]:
        """The module of each branch."""
        return [branch.get_submodule(name) for branch in self.branches]

    def per_branch(self, name: str) -> bool:
        """Whether each branch has its own value of a tensor."""
        return name in self._own


class GroupedForm:
    """The grouped form of a level's branches at the time of construction.

    Attributes:
        packed: the form; None if there is none.
        reason: why there is none.
        contiguous: whether all their tensors are adjacent in memory.
        updates_statistics: whether a call in this mode updates running statistics.
    """

    def __init__(self, branches: Sequence[nn.Module], known: Mapping[str, type], flat: Mapping[str, Tensor]) -> None:
        """Find the form.

        Args:
            branches: all of a level.
            known: the types of a branch's modules by name, with which the grouped form was checked.
            flat: what `hierens.branches.tensors.make_contiguous` returned for these branches.
        """
        closed = dict(_modules_to_loop(branches, known))
        self.packed: Packed | None = None
        self.reason = closed.get("", "")
        self._modules = [[m for n, m in branch.named_modules() if not _is_within(n, closed)] for branch in branches]
        self._all = 0, len(branches)
        self._snapshots = {self._all: _Snapshot(list(chain.from_iterable(self._modules)))}
        own = [{n: tensor for n, tensor in state_of(branch) if not _is_within(n, closed)} for branch in branches]
        shared = shared_names(branches[0])
        self.contiguous = not self.reason and all(
            are_contiguous([state[name] for state in own], flat.get(name)) for name in own[0] if name not in shared
        )
        self.updates_statistics = any(
            module.training and module.track_running_stats
            for module in branches[0].modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        )
        if not self.reason:
            try:
                self.packed = Packed(BranchLayers(branches, flat), closed, unchecked=closed)
            except PackError as error:
                self.reason = str(error)

    def is_current(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether these branches are unchanged, so that the form gives their results."""
        run = start, self._all[1] if stop is None else stop
        try:
            return (self._snapshots.get(run) or self._snapshot(run)).is_current()
        except Exception:  # raised when tensors are compared that were replaced or have no address
            return False

    def _snapshot(self, run: tuple[int, int]) -> _Snapshot:
        """A snapshot of some branches; it dates from the form's construction if all branches are unchanged since."""
        part = _Snapshot(list(chain.from_iterable(self._modules[slice(*run)])))
        all_branches = self._snapshots[self._all]
        return self._snapshots.setdefault(run, part) if all_branches.is_current() else all_branches


class _Snapshot:
    """A record of modules: types, submodules, settings, hooks and tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.types = list(map(type, modules))
        self.states = [vars(module) for module in modules]
        self.sizes = list(map(len, self.states))  # an instance's own `forward` adds one
        self.with_forward = [state for state in self.states if "forward" in state]
        self.forwards = [state["forward"] for state in self.with_forward]
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for module in modules:
            alike.setdefault(tuple(_settings(module)), []).append(vars(module))
        self.settings = [(itemgetter(*names), states) for names, states in alike.items() if names]
        self.values = [list(map(get, states)) for get, states in self.settings]
        self.hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        own: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self.owners = [holder for holder in own if holder]
        self.empty = [holder for holder in own if not holder]
        self.owned = list(map(dict.copy, self.owners))
        self.tensors = [value for holder in self.owned for value in holder.values() if isinstance(value, Tensor)]
        # Dictionaries compare values by identity first. A different tensor is then compared by its elements: with more
        # than one this raises an error (see `GroupedForm.is_current`), with one it may be equal, so ids are compared.
        scalars = [(h, k) for h in self.owners for k, v in h.items() if isinstance(v, Tensor) and v.numel() == 1]
        self.holders, self.keys = [holder for holder, _ in scalars], [key for _, key in scalars]
        self.ids = list(map(id, map(getitem, self.holders, self.keys)))
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.numbers = list(map(Tensor.numel, self.tensors))

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        return (
            [list(map(get, states)) for get, states in self.settings] == self.values
            and list(map(type, self.modules)) == self.types
            and list(map(len, self.states)) == self.sizes
            and [state["forward"] for state in self.with_forward] == self.forwards
            and not any(self.hooks)
            and not any(self.empty)
            and self.owners == self.owned
            and list(map(id, map(getitem, self.holders, self.keys))) == self.ids
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(Tensor.numel, self.tensors)) == self.numbers
        )


def _modules_to_loop(branches: Sequence[nn.Module], known: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    """The outermost modules that must be called once per branch, by name, with the reasons."""
    found: dict[str, str] = {}
    for name, module in branches[0].named_modules():
        if not _is_within(name, found) and (reason := _reason_to_loop(name, module, branches, known.get(name))):
            found[name] = reason
            yield name, reason


def _is_within(name: str, closed: Mapping[str, str]) -> bool:
    """Whether a name is one of these modules, or inside one."""
    return bool(closed) and ("" in closed or any(name == own or name.startswith(f"{own}.") for own in closed))


def _reason_to_loop(name: str, module: nn.Module, branches: Sequence[nn.Module], known: type | None) -> str:
    """Why a module must be called once per branch; empty if a grouped form gives the same results."""
    kind = class_of(module)
    if kind is not known and layer_form(module) is None and not per_channel(module):
        return f"a {kind.__name__} has replaced the original module"
    try:
        peers = [branch.get_submodule(name) for branch in branches]
    except AttributeError:
        return "some branches do not have it"
    for peer in peers:
        if class_of(peer) is not kind:
            return f"branches have {kind.__name__} and {type(peer).__name__}"
        if any(getattr(peer, hooks) for hooks in _HOOKS):
            return "it has hooks"
        if (forward := _forward_of(peer)) is None or forward is not _forward_of(module):
            return "it has a forward of its own"
        if not _same_settings(peer, module) or not _same_tensors(peer, module):
            return "it is not the same in all branches"
    return ""


def _forward_of(module: nn.Module) -> Any:
    """What a call runs: the class, for its `forward`, or another method of it; None if it is something else.

    A module may choose another method of its class as its `forward`, as those of timm's FasterNet do. A layer with a
    packed form may not: that form is the class's own `forward`.
    """
    own = vars(module).get("forward")
    if own is None:
        return class_of(module)
    function = getattr(own, "__func__", None)
    is_method = getattr(own, "__self__", None) is module and function in vars(type(module)).values()
    return function if is_method and layer_form(module) is None and not per_channel(module) else None


def class_of(module: nn.Module) -> type:
    """A module's class; for a graph the base class, since each graph has a class of its own."""
    return type(module).__mro__[1] if isinstance(module, fx.GraphModule) else type(module)


def _same_settings(module: nn.Module, other: nn.Module) -> bool:
    names = _settings(module)
    return (
        names == _settings(other)
        and all(vars(module)[name] == vars(other)[name] for name in names)
        and list(module._modules) == list(other._modules)
    )


def _same_tensors(module: nn.Module, other: nn.Module) -> bool:
    for own, others in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
        if list(own) != list(others):
            return False
        for a, b in zip(own.values(), others.values(), strict=True):
            if a is None or b is None:
                if a is not b:
                    return False
            elif not (type(a) in _TENSORS and type(b) in _TENSORS and _layout(a) == _layout(b)):
                return False
    return True


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _settings(module: nn.Module) -> list[str]:
    """Names of the attributes with plain values, which a module's `forward` may read."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _BY_SHAPE and (type(value) in _PLAIN or _is_plain_tuple(value))
    ]


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in _PLAIN for item in value)
