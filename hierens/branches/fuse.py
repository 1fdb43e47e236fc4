"""Prepares levels and blocks for inference: folds batch norms and attaches activations to convolutions.

A fused model's outputs equal the original model's up to rounding: at inference a batch norm is an affine map of each
channel (section 3.2.2 of Ioffe & Szegedy, arXiv 1502.03167).
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

from hierens.branches.executor import AnyLevel
from hierens.branches.fused_layers import FusedConvolution, attachable, separate_activations
from hierens.branches.fused_level import FusedLevel, UnpackedLayer, packed_state, unpacked_layers
from hierens.branches.grouped_block import Packed, traced
from hierens.branches.layer_forms import PackError
from hierens.branches.layers import SAME, STANDARDISED, standardised
from hierens.branches.level import Level
from hierens.branches.light import LightLayer
from hierens.branches.tensors import concatenate, replace, state_of
from hierens.core.protocol import Step
from hierens.cutting.block import Block

_CONVOLUTIONS = (nn.Conv2d, *SAME, *STANDARDISED)
_ONLY_TRAINING = (nn.Identity, nn.Dropout, DropPath)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayersSeen:
    """A record of the layers inside blocks at the time when the blocks' graphs were made."""

    def __init__(self, levels: Iterable[nn.Module]) -> None:
        modules = [module for level in levels for name, module in level.named_modules() if name]
        self._owners = [module._modules for module in modules if module._modules]
        self._leaves = [module._modules for module in modules if not module._modules]
        self._parts = self._present()
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]

    def _present(self) -> tuple[nn.Module | None, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._owners)))

    def check(self) -> None:
        """Compare the record with the current layers; takes 10 to 20 microseconds for 200 layers, at every call.

        Raises:
            ValueError: a layer was replaced or changed, or has a hook.
        """
        if any(self._hooks):
            refuse("given hooks on single layers")
        if any(self._leaves):
            refuse("changed layer by layer (a layer has new submodules, for example a parametrisation)")
        if (present := self._present()) != self._parts:
            new = next((type(module).__name__ for module in present if module not in self._parts), "nothing")
            refuse(f"changed layer by layer (a layer was replaced by {new})")

    def __deepcopy__(self, memo: dict[int, Any]) -> LayersSeen:
        return self  # a copied model makes its own record


def with_separate_activations(walk: Generator[Step, Tensor | None, None]) -> Generator[Step, Tensor | None, None]:
    """A walk with `separate_activations` inside its steps, but not in the consumer's code between them."""
    kept = None
    while True:
        with separate_activations():
            try:
                step = walk.send(kept)
            except StopIteration:
                return
        kept = yield step


def refuse(what: str) -> NoReturn:
    """Raise the ValueError for an operation, given as a participle, that fused models do not support."""
    raise ValueError(
        f"a fused model is for inference only and cannot be {what}: change the original model, then call fuse() again."
    )


def fused_levels(levels: Sequence[AnyLevel]) -> list[AnyLevel]:
    """Copies of levels for inference, folded where they have a grouped form.

    Raises:
        ValueError: a layer has a hook, which would no longer be called.
    """
    for index, level in enumerate(levels):
        for name, module in level.named_modules():
            if level.grouped and name and any(getattr(module, hooks) for hooks in _HOOKS):
                raise ValueError(
                    f"fuse() merges layers and would call none of their hooks: remove those of {name} in level {index} "
                    "first."
                )
    return [_fused(level) for level in levels if isinstance(level, Level)]


def attach_activations(model: nn.Module) -> None:
    """Run activations inside their convolutions, or after them if any weight is not finite."""
    finite = all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    for module in model.modules():
        if isinstance(module, FusedConvolution):
            module.attach_activation(finite)


def _fused(level: Level) -> AnyLevel:
    plain = copy.deepcopy(level).eval()
    form = plain.grouped_form() if plain.grouped and plain.branches > 1 else None
    if isinstance(form, Packed):
        scalars = frozenset(name for name, tensor in state_of(plain[0]) if tensor.ndim == 0)
        fused = FusedLevel(fold(_packed(list(plain), form.per_branch)), plain.branches, scalars)
    elif plain.grouped and plain.branches == 1:
        fused = FusedLevel(fold(plain.first()), 1, frozenset())
    else:
        return plain
    fused.executor = level.executor
    return fused


@torch.no_grad()
def _packed(branches: list[Any], per_branch: Iterable[str]) -> Any:
    """A block with packed weights; the layers named `per_branch` keep one module per branch."""
    block = branches[0]
    states = [dict(state_of(branch)) for branch in branches]
    layers = {name: UnpackedLayer(branch.get_submodule(name) for branch in branches) for name in per_branch}
    for name, module in layers.items():
        block.set_submodule(name, module)
    for name, _ in packed_state(block):
        replace(block, name, concatenate(state[name] for state in states))
    return block


def fold_where_traced(block: nn.Module) -> nn.Module:
    """A folded copy of a block, or the block itself if it cannot be traced to its layers."""
    assert isinstance(block, fx.GraphModule)
    with contextlib.suppress(PackError):  # inference runtimes then fold it themselves
        return fold(copy.deepcopy(block))
    return block


@torch.no_grad()
def fold(block: fx.GraphModule) -> fx.GraphModule:
    """A block for inference, with successive convolutions, batch norms and activations merged into one layer.

    Args:
        block: in evaluation mode, possibly with packed weights; its modules become part of the result.
    """
    graph = traced(block, dict.fromkeys((name for name, _ in unpacked_layers(block)), "each branch has its own"))
    modules = dict(block.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], _ONLY_TRAINING):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op == "call_module" and calls[node.target] == 1:
            if _is_plain(modules[node.target]):
                _replace(block, graph, modules, node)
            elif isinstance(modules[node.target], LightLayer):
                _fold_into_factors(block, graph, modules, node)
    folded = Block(block, graph, class_name="FusedBlock")
    kept = {name for name, _ in block.named_buffers()} & block.state_dict().keys()
    for name in dict(folded.named_buffers()).keys() - kept:
        owner, _, key = name.rpartition(".")
        folded.get_submodule(owner)._non_persistent_buffers_set.add(key)
    return folded


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution that `FusedConvolution` can replace."""
    if not isinstance(module, nn.Conv2d) or type(module) not in _CONVOLUTIONS:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _replace(block: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node) -> None:
    """Replace a convolution, with the batch norm and activation that follow it, by a fused convolution."""
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


def _fold_into_factors(block: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], node: fx.Node) -> None:
    """Fold the batch norm that follows a light layer into its output scale and bias; an activation of it remains."""
    layer: Any = modules[str(node.target)]
    norm, followed = _follower(node, modules)
    if followed is None or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return
    assert norm.running_var is not None
    scale = layer.factors().get("s", torch.ones_like(norm.running_mean))
    args = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    scale, layer.bias = fuse_conv_bn_weights(scale.unsqueeze(1), layer.bias, *args)  # rows, as those of a weight
    layer.s = nn.Parameter(scale.flatten())
    block.set_submodule(str(followed.target), norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    if not isinstance(norm, BatchNormAct2d):
        followed.replace_all_uses_with(node)
        graph.erase_node(followed)


def _follower(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, fx.Node | None]:
    """The module that alone reads a value, and the node that calls it; None for several, or something else."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or len(users[0].all_input_nodes) != 1:
        return None, None
    return modules[str(users[0].target)], users[0]
