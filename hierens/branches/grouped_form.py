"""What a grouped form of ordinary branches rests on: that they are alike, and still what they were.

Whoever replaces a layer, hooks into it, freezes it, prunes it or moves it changes an ordinary module, as everywhere in
torch. A grouped form is made from the modules as they are, leaves to each branch what is not alike in all of them or
not known, and is used only as long as they are what it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import getitem, itemgetter
from typing import Any

from torch import Tensor, fx, nn

from hierens.branches.grouped_block import Packed
from hierens.branches.rules import PackError, layer_form, per_channel
from hierens.branches.tensors import Stack, are_laid, state_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = (Tensor, nn.Parameter)
# Settings that tell of tensors' shapes, which are compared themselves.
_BY_SHAPE = {
    *("in_channels", "out_channels", "kernel_size", "in_features", "out_features", "num_features", "num_channels"),
    *("transposed", "output_padding", "affine", "elementwise_affine"),
}
_PLAIN = (int, float, bool, str, type(None))


class BranchLayers:
    """The layers of several ordinary branches, as `hierens.branches.rewrite.Layers`."""

    def __init__(self, branches: Sequence[nn.Module], wholes: Mapping[str, Tensor]) -> None:
        self.branches, self.block, self.wholes = list(branches), branches[0], wholes
        self._own = {name for name, _ in state_of(self.block)}

    def layer(self, name: str) -> Stack:
        """A layer of all branches."""
        prefix = f"{name}." if name else ""
        own = {n.removeprefix(prefix): whole for n, whole in self.wholes.items() if n.startswith(prefix)}
        return Stack(self.modules(name), own)

    def modules(self, name: str) -> list[nn.Module]:
        """Each branch's own module."""
        return [branch.get_submodule(name) for branch in self.branches]

    def per_branch(self, name: str) -> bool:
        """Whether a tensor differs from branch to branch."""
        return name in self._own


class GroupedForm:
    """The grouped form of some branches as they are now.

    Attributes:
        packed: the form; None if they have none.
        because: why they have none.
        laid: whether all their tensors lie one after another in memory.
        moves: whether a call in this mode moves running statistics.
    """

    def __init__(
        self, branches: Sequence[fx.GraphModule], known: Mapping[str, type], wholes: Mapping[str, Tensor]
    ) -> None:
        """Find the form.

        Args:
            branches: all of a level.
            known: the types of a branch's modules by name, of which the grouped form has been checked.
            wholes: what `hierens.branches.tensors.lay` returned for these branches.
        """
        closed = dict(_unlike(branches, known))
        self.packed: Packed | None = None
        self.because = closed.get("", "")
        self._modules = [[m for name, m in branch.named_modules() if not _within(name, closed)] for branch in branches]
        self._all = 0, len(branches)
        self._kept = {self._all: _Kept(list(chain.from_iterable(self._modules)))}
        own = [{n: tensor for n, tensor in state_of(branch) if not _within(n, closed)} for branch in branches]
        self.laid = not self.because and all(
            are_laid([state[name] for state in own], wholes.get(name)) for name in own[0]
        )
        self.moves = any(
            module.training and module.track_running_stats
            for module in branches[0].modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        )
        if not self.because:
            try:
                self.packed = Packed(BranchLayers(branches, wholes), closed, unlike=closed)
            except PackError as error:
                self.because = str(error)

    def holds(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether these branches are what they were, so that the form does what they do."""
        run = start, self._all[1] if stop is None else stop
        try:
            return (self._kept.get(run) or self._part(run)).holds()
        except Exception:  # such as tensors that were replaced, or the address of one that has none
            return False

    def _part(self, run: tuple[int, int]) -> _Kept:
        """Some of the branches as they were when the form was found, which they are while all are what they were."""
        part = _Kept(list(chain.from_iterable(self._modules[slice(*run)])))
        whole = self._kept[self._all]
        return self._kept.setdefault(run, part) if whole.holds() else whole


class _Kept:
    """Modules as they were: types, parts, settings, hooks and tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.types = list(map(type, modules))
        self.states = [vars(module) for module in modules]
        self.sizes = list(map(len, self.states))  # a forward of its own is one more
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
        # Dictionaries compare values by identity first. Another tensor is then compared by its elements, which says
        # nothing of identity if it has one, and raises an error if it has more: see `GroupedForm.holds`.
        scalars = [(h, k) for h in self.owners for k, v in h.items() if isinstance(v, Tensor) and v.numel() == 1]
        self.holders, self.keys = [holder for holder, _ in scalars], [key for _, key in scalars]
        self.ids = list(map(id, map(getitem, self.holders, self.keys)))
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.numbers = list(map(Tensor.numel, self.tensors))

    def holds(self) -> bool:
        """Whether it is all the same."""
        return (
            [list(map(get, states)) for get, states in self.settings] == self.values
            and list(map(type, self.modules)) == self.types
            and list(map(len, self.states)) == self.sizes
            and not any(self.hooks)
            and not any(self.empty)
            and self.owners == self.owned
            and list(map(id, map(getitem, self.holders, self.keys))) == self.ids
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(Tensor.numel, self.tensors)) == self.numbers
        )


def _unlike(branches: Sequence[nn.Module], known: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    """Modules that each branch must run by itself, by name, and why; what is inside of one is not named again."""
    found: dict[str, str] = {}
    for name, module in branches[0].named_modules():
        if not _within(name, found) and (because := _difference(name, module, branches, known.get(name))):
            found[name] = because
            yield name, because


def _within(name: str, closed: Mapping[str, str]) -> bool:
    """Whether something stands in one of these modules."""
    return bool(closed) and ("" in closed or any(name == own or name.startswith(f"{own}.") for own in closed))


def _difference(name: str, module: nn.Module, branches: Sequence[nn.Module], known: type | None) -> str:
    """Why a module is to be run by each branch; empty if a grouped form may stand for it."""
    kind = kind_of(module)
    if kind is not known and layer_form(module) is None and not per_channel(module):
        return f"{kind.__name__} took the place of what was there"
    try:
        peers = [branch.get_submodule(name) for branch in branches]
    except AttributeError:
        return "not all branches have it"
    for peer in peers:
        if kind_of(peer) is not kind:
            return f"branches have {kind.__name__} and {type(peer).__name__}"
        if any(getattr(peer, hooks) for hooks in _HOOKS):
            return "it has hooks"
        if "forward" in vars(peer):
            return "it has a forward of its own"
        if not _same_settings(peer, module) or not _same_tensors(peer, module):
            return "it is not alike in all branches"
    return ""


def kind_of(module: nn.Module) -> type:
    """A module's class; of a graph the one that graphs have in common, for each has a class of its own."""
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
            elif not (type(a) in _TENSORS and type(b) in _TENSORS and _kind(a) == _kind(b)):
                return False
    return True


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _settings(module: nn.Module) -> list[str]:
    """Names of the plain values that a module's forward may read."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _BY_SHAPE and (type(value) in _PLAIN or _is_plain_tuple(value))
    ]


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in _PLAIN for item in value)
