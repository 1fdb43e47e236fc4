"""A model made ready for inference: batch norms folded into convolutions, activations attached, weights in order.

What a fused model answers equals what the model answers, up to rounding (section 3.2.2 of Ioffe & Szegedy, arXiv
1502.03167: at inference a batch norm is an affine map of each channel).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hierens.branches.fused_layers import FusedConvolution, activations_apart, attachable
from hierens.branches.fused_level import Apart, FusedLevel, apart_in, packed_state
from hierens.branches.grouped_block import Packed, traced
from hierens.branches.layers import SAME, STANDARDISED, standardised
from hierens.branches.level import AnyLevel, Level
from hierens.branches.rules import PackError
from hierens.branches.tensors import concatenate, replace, state_of
from hierens.core.protocol import Step
from hierens.cutting.graphs import Block

_CONVOLUTIONS = (nn.Conv2d, *SAME, *STANDARDISED)
_ONLY_TRAINING = (nn.Identity, nn.Dropout, DropPath)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayersSeen:
    """The layers inside of blocks, as they were when the blocks' graphs were made."""

    def __init__(self, levels: Iterable[nn.Module]) -> None:
        modules = [module for level in levels for name, module in level.named_modules() if name]
        self._owners = [module._modules for module in modules if module._modules]
        self._leaves = [module._modules for module in modules if not module._modules]
        self._parts = self._present()
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]

    def _present(self) -> tuple[nn.Module | None, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._owners)))

    def check(self) -> None:
        """Compare them with what is there now: 10 to 20 microseconds for 200 layers, since it is done at every call.

        Raises:
            ValueError: a layer was replaced, changed, or has a hook.
        """
        if any(self._hooks):
            refuse("hooked into at single layers")
        if any(self._leaves):
            refuse("changed layer by layer (a layer got parts of its own, as by a parametrisation)")
        if (present := self._present()) != self._parts:
            new = next((type(module).__name__ for module in present if module not in self._parts), "nothing")
            refuse(f"changed layer by layer ({new} took the place of what was there)")

    def __deepcopy__(self, memo: dict[int, Any]) -> LayersSeen:
        return self  # whoever copies a model watches the copy's own


def apart_at_every_step(walk: Generator[Step, Tensor | None, None]) -> Generator[Step, Tensor | None, None]:
    """A walk whose consumer does not run inside what its steps run inside."""
    kept = None
    while True:
        with activations_apart():
            try:
                step = walk.send(kept)
            except StopIteration:
                return
        kept = yield step


def refuse(what: str) -> NoReturn:
    """Raise a ValueError that says what a fused model cannot be."""
    raise ValueError(
        f"a fused model is for inference only and cannot be {what}: do that with the model it was made from, "
        "then call fuse() again."
    )


def fused_levels(levels: Sequence[AnyLevel]) -> list[AnyLevel]:
    """Copies of levels for inference, folded where they have a grouped form.

    Raises:
        ValueError: a layer has a hook, which would be called no more.
    """
    for index, level in enumerate(levels):
        for name, module in level.named_modules():
            if level.grouped and name and any(getattr(module, hooks) for hooks in _HOOKS):
                raise ValueError(
                    f"fuse() folds layers into each other and would call none of their hooks: remove those of {name} "
                    f"in level {index} first."
                )
    return [_fused(level) for level in levels if isinstance(level, Level)]


def attach_activations(model: nn.Module) -> None:
    """Let activations run within their convolutions, or after them if there are weights that are not finite."""
    finite = all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    for module in model.modules():
        if isinstance(module, FusedConvolution):
            module.attach_activation(finite)


def _fused(level: Level) -> AnyLevel:
    plain = copy.deepcopy(level).eval()
    form = plain.grouped_form() if plain.grouped and plain.branches > 1 else None
    if isinstance(form, Packed):
        scalars = frozenset(name for name, tensor in state_of(plain[0]) if tensor.ndim == 0)
        fused = FusedLevel(fold(_packed(list(plain), form.apart)), plain.branches, scalars)
    elif plain.grouped and plain.branches == 1:
        fused = FusedLevel(fold(plain.first()), 1, frozenset())
    else:
        return plain
    fused.executor = level.executor
    return fused


@torch.no_grad()
def _packed(branches: list[Any], apart: Iterable[str]) -> Any:
    """A block with the weights of all branches packed, but those of layers that each branch has for itself."""
    block = branches[0]
    states = [dict(state_of(branch)) for branch in branches]
    layers = {name: Apart([branch.get_submodule(name) for branch in branches]) for name in apart}
    for name, module in layers.items():
        block.set_submodule(name, module)
    for name, _ in packed_state(block):
        replace(block, name, concatenate(state[name] for state in states))
    return block


def fold_where_traced(block: nn.Module) -> nn.Module:
    """A folded copy of a block, or the block itself if it cannot be traced to its layers."""
    assert isinstance(block, fx.GraphModule)
    with contextlib.suppress(PackError):  # runtimes fold for themselves
        return fold(copy.deepcopy(block))
    return block


@torch.no_grad()
def fold(block: fx.GraphModule) -> fx.GraphModule:
    """A block's layers for inference, with convolution, batch norm and activation in one where they follow each other.

    Args:
        block: in evaluation mode, also with the weights of several branches packed; the result takes over its modules.
    """
    graph = traced(block, dict.fromkeys((name for name, _ in apart_in(block)), "each branch has its own"))
    modules = dict(block.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], _ONLY_TRAINING):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op == "call_module" and calls[node.target] == 1 and _is_plain(modules[node.target]):
            _replace(block, graph, modules, node)
    folded = Block(block, graph, class_name="FusedBlock")
    kept = {name for name, _ in block.named_buffers()} & block.state_dict().keys()
    for name in dict(folded.named_buffers()).keys() - kept:
        owner, _, key = name.rpartition(".")
        folded.get_submodule(owner)._non_persistent_buffers_set.add(key)
    return folded


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution that `FusedConvolution` can stand for."""
    if not isinstance(module, nn.Conv2d) or type(module) not in _CONVOLUTIONS:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _replace(block: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node) -> None:
    """Put a fused convolution in the place of a convolution and of what follows it."""
    convolution: Any = modules[str(node.target)]
    weight, bias, activation = convolution.weight, convolution.bias, None
    if isinstance(convolution, STANDARDISED):
        weight = standardised(convolution, weight, getattr(convolution, "gain", None))
    norm, followed = _follower(node, modules)
    if followed is not None and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        assert norm.running_var is not None
        args = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(weight, bias, *args)
        if isinstance(norm, BatchNormAct2d) and not isinstance(norm.act, nn.Identity):
            activation = norm.act
        followed.replace_all_uses_with(node)
        graph.erase_node(followed)
    act, followed = _follower(node, modules)
    if activation is None and followed is not None and act is not None and attachable(act):
        activation = act
        followed.replace_all_uses_with(node)
        graph.erase_node(followed)
    same_pad = isinstance(convolution, SAME) and getattr(convolution, "same_pad", True)
    fused = FusedConvolution(convolution, weight, bias, activation, same_pad)
    owner, _, key = str(node.target).rpartition(".")
    setattr(block.get_submodule(owner), key, fused)


def _follower(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, fx.Node | None]:
    """The module that is the only one to read a value, and the node that calls it."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or len(users[0].all_input_nodes) != 1:
        return None, None
    return modules[str(users[0].target)], users[0]
