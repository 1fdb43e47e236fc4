"""Light layers: a level's branches share the weight of a dense layer, and each has its own factors and bias.

With input x, shared weight W, and elementwise products `*`, a layer computes

    rank1:  y = s * (W (r * x)) + b         effective weight W * outer(s, r)
    lora:   y = W x + B (A x) + b           effective weight W + B A

`rank1` is BatchEnsemble (Wen et al., ICLR 2020, arXiv 2002.06715): r scales the input channels, s the output channels.
`lora` adds a product of rank `rank` (Hu et al., arXiv 2106.09685); for a convolution, A has its kernel and groups, and
B is 1x1. Factors of one, and B = 0, give the layer that was shared.

A layer is light if it is an `nn.Linear`, `nn.Conv1d` or `nn.Conv2d`, or timm's `Linear` or `Conv2dSame`, with two or
more inputs per output channel and more weights than factors, that is called and not only read; all others are
full: each branch has its own.

MACs: those of A and B are counted; r and s are elementwise, as norms and activations are, and left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn

from hierens.core.macs import count_macs
from hierens.core.members import Kind

FACTORS = ("r", "s", "lora_a", "lora_b")
SCALES = ("r", "s")  # without weight decay: it would pull them to zero, not to one
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}


class LightLayer(nn.Module):
    """A layer that holds the weight that all branches of its level share, and its own factors and bias.

    Attributes:
        base: the class of the layer without factors.
        weight: the shared weight W.
        bias: of this branch, or None.
    """

    base: ClassVar[type[nn.Module]]
    weight: Any
    bias: Any
    groups: int = 1

    def add_factors(self, kind: Kind, rank: int | None) -> None:
        """Add the factors of a kind, with values that do not change the layer."""
        shape = self.weight.shape
        sizes = factor_sizes(shape, self.groups, kind, rank)
        for name, size in sizes.items():
            factor = nn.Parameter(self.weight.new_empty(size), self.weight.requires_grad)
            self.register_parameter(name, factor)
        for name, value in self.fresh_factors().items():
            self._parameters[name].data.copy_(value)  # type: ignore[union-attr]

    def effective_weight(self) -> Tensor:
        """The weight of this branch."""
        groups, weight, own = self.groups, self.weight, self.factors()
        if "lora_a" in own:
            a = own["lora_a"].flatten(1).unflatten(0, (groups, -1))  # (groups, rank, inputs * kernel)
            weight = weight + (own["lora_b"].unflatten(0, (groups, -1)) @ a).view(weight.shape)
        found: Tensor = self.scaled(weight, own["s"], own.get("r")) if "s" in own else weight
        return found

    def scaled(self, weight: Tensor, s: Tensor, r: Tensor | None) -> Tensor:
        """W * outer(s, r)."""
        scale = s.view(self.groups, -1, 1)
        scale = scale if r is None else scale * r.view(self.groups, 1, -1)
        return weight * scale.flatten(0, 1).view(len(weight), -1, *(1,) * (weight.ndim - 2))

    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        found: Any = self._parameters
        return {name: found[name] for name in FACTORS if found.get(name) is not None}

    def fresh_factors(self) -> dict[str, Tensor]:
        """Initial values of the factors: ones; for `lora` a random A, drawn from torch's generator, and B = 0."""
        fresh = {}
        for name, factor in self.factors().items():
            fresh[name] = torch.zeros_like(factor) if name == "lora_b" else torch.ones_like(factor)
            if name == "lora_a":
                nn.init.kaiming_uniform_(fresh[name], math.sqrt(5))
        return fresh

    def forward(self, x: Tensor) -> Tensor:
        """The output of this branch, (N, C, ...) for convolutions, (..., C) for linear layers."""
        if self.scales_weight(x):
            return self.product(x, self.effective_weight(), self.bias)
        return self.with_factors(x)

    def scales_weight(self, x: Tensor) -> bool:
        """Whether to multiply the weight, not the images: whichever is smaller. Graphs hold the shared weight."""
        graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        return not graph and not x.is_meta and x.numel() > self.weight.numel()

    def with_factors(self, x: Tensor) -> Tensor:
        """The output, computed from the shared weight."""
        own = self.factors()
        y = self.product(x * self.along_channels(own["r"]) if "r" in own else x, self.weight)
        if "lora_a" in own:
            y = y + self.second_product(self.product(x, own["lora_a"]), own["lora_b"])
        if "s" in own:
            y = y * self.along_channels(own["s"])
        return y if self.bias is None else y + self.along_channels(self.bias)

    def along_channels(self, vector: Tensor) -> Tensor:
        """A vector with an entry per channel, in a shape that broadcasts."""
        return vector

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with this weight and bias."""
        raise NotImplementedError

    def second_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """B of `lora`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """That of the layer, and the names of its factors."""
        return f"{super().extra_repr()}, factors: {', '.join(self.factors())}"


class LightLinear(LightLayer, nn.Linear):
    """See `LightLayer`."""

    base = nn.Linear

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LightLayer`."""
        return F.linear(x, weight, bias)

    def second_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `LightLayer`."""
        return F.linear(x, weight)


class LightTimmLinear(LightLinear):
    """See `LightLayer`."""

    base = tl.Linear


class _LightConvolution(LightLayer):
    def along_channels(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * (self.weight.ndim - 2))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer: Any = self
        return layer._conv_forward(x, weight, bias)

    def second_product(self, x: Tensor, weight: Tensor) -> Tensor:
        positions = self.weight.ndim - 2
        return _CONVOLUTIONS[positions](x, weight.view(*weight.shape, *(1,) * positions), groups=self.groups)


class LightConv1d(_LightConvolution, nn.Conv1d):
    """See `LightLayer`."""

    base = nn.Conv1d


class LightConv2d(_LightConvolution, nn.Conv2d):
    """See `LightLayer`."""

    base = nn.Conv2d


class LightConv2dSame(_LightConvolution, tl.Conv2dSame):
    """See `LightLayer`."""

    base = tl.Conv2dSame

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LightLayer`."""
        layer: Any = self
        x = pad_same(x, weight.shape[-2:], layer.stride, layer.dilation)
        return F.conv2d(x, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


LIGHT_LAYERS = (LightLinear, LightTimmLinear, LightConv1d, LightConv2d, LightConv2dSame)
_LIGHT: dict[type[nn.Module], type[LightLayer]] = {light.base: light for light in LIGHT_LAYERS}


def factor_sizes(shape: Sequence[int], groups: int, kind: Kind, rank: int | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors of a layer.

    Args:
        shape: of its weight, (outputs, inputs / groups, ...).
        groups: of a convolution, 1 for a linear layer.
        kind: `rank1` or `lora`.
        rank: of `lora`.
    """
    outputs, inputs, *kernel = shape
    if kind == "rank1":
        return {"r": (inputs * groups,), "s": (outputs,)}
    assert rank is not None
    return {"lora_a": (rank * groups, inputs, *kernel), "lora_b": (outputs, rank)}


def lighten(block: nn.Module, kind: Kind, rank: int | None, only: Collection[str] | None = None) -> nn.Module:
    """Make the layers of a block light, in place.

    Args:
        block: the block, or a single layer.
        kind: of the members; with `full` nothing changes.
        rank: of `lora`.
        only: the names of the layers that may become light, by default all: those of `called_layers`.
    """
    users = Counter(id(value) for module in block.modules() for value in module._parameters.values())
    for name, module in list(block.named_modules()):
        light, weight = _LIGHT.get(type(module)), module._parameters.get("weight")
        if kind == "full" or light is None or weight is None or (only is not None and name not in only):
            continue
        sizes = factor_sizes(weight.shape, getattr(module, "groups", 1), kind, rank)
        factors = sum(map(math.prod, sizes.values()))
        # A weight that two layers use, or a layer with a forward of its own, is not changed.
        own = users[id(weight)] == 1 and "forward" not in vars(module)
        if own and weight.shape[1] > 1 and factors < weight.numel():
            module.__class__ = light
            light.add_factors(module, kind, rank)
    return block


def called_layers(parts: Sequence[nn.Module], size: Sequence[int]) -> list[set[str]]:
    """The names of the layers that are called, in each of the consecutive parts of a network.

    Some networks read the weight of a layer instead of calling it, and would not notice its factors.

    Args:
        parts: of the network.
        size: of an image, (C, H, W).
    """
    called: list[set[str]] = [set() for _ in parts]

    def run(copies: Any, value: Any) -> Iterator[Any]:
        for part, names in zip(copies, called, strict=True):
            for name, module in part.named_modules():
                module.register_forward_pre_hook(lambda _, __, names=names, name=name: names.add(name))
            value = part(*value) if isinstance(value, tuple) else part(value)
            yield value

    count_macs(nn.ModuleList(parts), size, run)
    return called


@torch.no_grad()
def merge(block: nn.Module) -> None:
    """Turn light layers into ordinary ones with their effective weights, in place."""
    for _, layer in light_layers(block):
        weight = nn.Parameter(layer.effective_weight().detach().clone(), layer.weight.requires_grad)
        for name in FACTORS:
            layer._parameters.pop(name, None)
        layer._parameters["weight"] = weight
        layer.__class__ = layer.base  # type: ignore[assignment]


def light_layers(block: nn.Module) -> Iterator[tuple[str, LightLayer]]:
    """The light layers of a branch, by name."""
    return ((name, module) for name, module in block.named_modules() if isinstance(module, LightLayer))


def shared_names(block: nn.Module) -> set[str]:
    """The names of the weights that the branches of a level share."""
    return {f"{name}.weight".lstrip(".") for name, _ in light_layers(block)}


def tie(branches: Sequence[nn.Module]) -> None:
    """Let the light layers of all branches hold the weights of the first branch."""
    for name, first in light_layers(branches[0]):
        for branch in branches[1:]:
            branch.get_submodule(name)._parameters["weight"] = first._parameters["weight"]


def factor_names(module: nn.Module, kinds: Collection[str] = FACTORS) -> set[str]:
    """The names of the factors (or of some of them) in a module."""
    return {
        f"{name}.{key}".lstrip(".") for name, layer in light_layers(module) for key in layer.factors() if key in kinds
    }


def fresh_factors(block: nn.Module) -> dict[str, Tensor]:
    """Initial values of all factors of a block, by name."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, layer in light_layers(block)
        for key, value in layer.fresh_factors().items()
    }
