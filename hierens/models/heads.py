"""What turns the features at a cut into logits: heads of early exits, the backbone's own, embeddings of answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hierens.core.adaptive import classifier_maker
from hierens.core.modes import evaluating
from hierens.core.timm_info import example_input

HeadKind = Literal["pool", "conv"]
_CONV_WIDTH = 128  # channels of a convolutional head, as MSDNet has them; in narrow networks it would dwarf the rest
_EMBEDDING = 128  # features that a previous exit's logits become, as in the authors' code for CIFAR


@dataclass(frozen=True)
class Layout:
    """Where things stand in the features that cross a cut.

    Attributes:
        kind: `NCHW` and `NHWC` are maps, `NLC` are tokens, `NC` is pooled already.
        channels: of a position.
        prefix: tokens in front that stand for no position, such as a class token.
        by_token: whether the first of them speaks for the image, as the backbone's own classifier takes it.
        part: which of several values that cross is meant; None where a single tensor does.
    """

    kind: Literal["NCHW", "NHWC", "NLC", "NC"]
    channels: int
    prefix: int = 0
    by_token: bool = False
    part: int | None = None

    def features(self, value: Any) -> Tensor:
        """The tensor of features among what crosses."""
        found: Tensor = value if self.part is None else value[self.part]
        return found

    def pooled(self, value: Any) -> Tensor:
        """Features of the image, (N, channels)."""
        x = self.features(value)
        if self.kind == "NC":
            return x
        if self.kind == "NLC":
            return x[:, 0] if self.by_token else x[:, self.prefix :].mean(1)
        return x.mean((2, 3) if self.kind == "NCHW" else (1, 2))


def layouts(backbone: nn.Module, blocks: tuple[fx.GraphModule, ...]) -> list[Layout]:
    """The layout of what every block but the last hands on, found by running them.

    Raises:
        ValueError: features in which channels and positions cannot be told apart.
    """
    example = example_input(backbone, 2)
    values = _handed_on(blocks, example)
    found = []
    for index, value in enumerate(values[:-1]):
        part, x = _features_of(value, index)
        shape = _ShapeReader(backbone, blocks, example, index, part)
        found.append(shape.layout(x))
    return found


@torch.no_grad()
def _handed_on(blocks: tuple[fx.GraphModule, ...], example: Tensor) -> list[Any]:
    value: Any = example
    values = []
    for block in blocks:
        with evaluating(block):
            value = block(*value) if isinstance(value, tuple) else block(value)
        values.append(value)
    return values


def _features_of(value: Any, index: int) -> tuple[int | None, Tensor]:
    """The one tensor with an entry per image (two here), among what crosses."""
    if isinstance(value, Tensor):
        return None, value
    parts = [
        (place, part)
        for place, part in enumerate(value)
        if isinstance(part, Tensor) and part.ndim > 1 and len(part) == 2 and part.is_floating_point()
    ]
    if len(parts) != 1:
        raise ValueError(
            f"{len(parts)} feature tensors cross after block {index}, and an exit reads one: cut elsewhere, by at= "
            "(hierens.cut_points lists the places, with what crosses them)."
        )
    return parts[0]


@dataclass(frozen=True)
class _ShapeReader:
    """Tells channels from positions by their numbers, in the features after a block."""

    backbone: nn.Module
    blocks: tuple[fx.GraphModule, ...]
    example: Tensor
    index: int
    part: int | None

    def layout(self, x: Tensor) -> Layout:
        if x.ndim == 2:
            return Layout("NC", x.shape[1], part=self.part)
        if x.ndim == 3:
            return self._tokens(x)
        if x.ndim != 4:
            raise ValueError(f"{self._named(x)} have {x.ndim} dimensions; an exit reads maps or tokens.")
        _, a, b, c = x.shape
        first, last = self._is_grid(b, c), self._is_grid(a, b)  # whether the others are positions: NCHW, NHWC
        if first and last:
            first, last = self._by_another_size(x)
        if first == last:
            raise ValueError(
                f"{self._named(x)} do not show which dimension holds the channels: cut elsewhere by at=[...]."
            )
        return Layout("NCHW", a, part=self.part) if first else Layout("NHWC", c, part=self.part)

    def _tokens(self, x: Tensor) -> Layout:
        height, width = self.example.shape[2:]
        by_token = getattr(self.backbone, "global_pool", None) == "token"
        for prefix in (int(getattr(self.backbone, "num_prefix_tokens", 0) or 0), 0):
            positions = x.shape[1] - prefix
            rows = math.isqrt(max(positions, 0) * height // width)
            if rows and positions % rows == 0 and self._is_grid(rows, positions // rows):
                return Layout("NLC", x.shape[2], prefix, by_token and prefix > 0, self.part)
        raise ValueError(f"{self._named(x)} are no grid of tokens (N, positions, channels): cut elsewhere by at=[...].")

    def _is_grid(self, rows: int, columns: int) -> bool:
        """Whether these could be the positions of a map, which has the proportions of the image."""
        height, width = self.example.shape[2:]
        return abs(rows / columns - height / width) <= height / width * 0.5 / min(rows, columns)

    def _by_another_size(self, x: Tensor) -> tuple[bool, bool]:
        """Which two dimensions follow the image's size; where that is fixed, timm's word for it."""
        try:
            larger = torch.nn.functional.interpolate(self.example, scale_factor=2)
            value = _handed_on(self.blocks[: self.index + 1], larger)[-1]
            moved = value if self.part is None else value[self.part]
            return moved.shape[1] == x.shape[1], moved.shape[3] == x.shape[3]
        except Exception:
            said = str(getattr(self.backbone, "output_fmt", ""))
            return "NCHW" in said, "NHWC" in said

    def _named(self, x: Tensor) -> str:
        return f"the features of shape {tuple(x.shape)} after block {self.index} of this {type(self.backbone).__name__}"


class PooledExit(nn.Module):
    """Global pooling, a layer norm where the backbone has no batch norms to keep the scale, and a linear layer.

    Args:
        layout: of the features.
        num_classes: number of classes.
        normalise: whether to have the layer norm.
    """

    def __init__(self, layout: Layout, num_classes: int, normalise: bool) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.LayerNorm(layout.channels) if normalise else nn.Identity()
        self.classifier = nn.Linear(layout.channels, num_classes)

    def forward(self, value: Any) -> Tensor:
        """What crosses the cut -> (N, classes)."""
        logits: Tensor = self.classifier(self.norm(self.layout.pooled(value)))
        return logits

    def reset(self, num_classes: int) -> None:
        """A new classifier."""
        self.classifier = _like(self.classifier, nn.Linear(self.layout.channels, num_classes))


class ConvExit(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU, global pooling and a linear layer, as MSDNet's exits.

    Args:
        layout: of the features: a map (N, C, H, W).
        num_classes: number of classes.

    Raises:
        ValueError: the features are no such map.
    """

    def __init__(self, layout: Layout, num_classes: int) -> None:
        super().__init__()
        if layout.kind != "NCHW":
            raise ValueError(f"head='conv' takes maps (N, C, H, W), and these features are {layout.kind}: use 'pool'.")
        self.layout = layout
        width = min(_CONV_WIDTH, 2 * layout.channels)
        self.convs = nn.Sequential(*_conv_bn_relu(layout.channels, width), *_conv_bn_relu(width, width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, value: Any) -> Tensor:
        """What crosses the cut -> (N, classes)."""
        logits: Tensor = self.classifier(self.convs(self.layout.features(value)).mean((2, 3)))
        return logits

    def reset(self, num_classes: int) -> None:
        """A new classifier."""
        self.classifier = _like(self.classifier, nn.Linear(self.classifier.in_features, num_classes))


class OwnExit(nn.Module):
    """The backbone's own head and classifier: the last exit.

    Args:
        head: from features to the classifier.
        classifier: the last linear layers and what follows them.
        names: of the last linear layers within it.
        features: channels that they read.
    """

    def __init__(self, head: fx.GraphModule, classifier: fx.GraphModule, names: tuple[str, ...], features: int) -> None:
        super().__init__()
        self.head, self.classifier, self.names, self.channels = head, classifier, names, features

    def forward(self, value: Any) -> Tensor:
        """What the last block hands on -> (N, classes)."""
        pooled = self.head(*value) if isinstance(value, tuple) else self.head(value)
        logits: Tensor = self.classifier(*pooled) if isinstance(pooled, tuple) else self.classifier(pooled)
        return logits

    def reset(self, num_classes: int) -> None:
        """New classifiers."""
        for name in self.names:
            old = self.classifier.get_submodule(name)
            owner, _, key = name.rpartition(".")
            make: Callable[[int], nn.Module] = classifier_maker(old, self.channels)
            setattr(self.classifier.get_submodule(owner), key, _like(old, make(num_classes)))


Exit = PooledExit | ConvExit | OwnExit


class Embedding(nn.Module):
    """What an exit takes from the previous one's logits (inline subnetwork collaboration, arXiv 1908.06294, 3.2).

    They are embedded by a linear layer, batch norm and ReLU; the paper concatenates the embedding with the features
    that the next classifier reads. A linear classifier of both is the sum of one of each, which is how it is computed
    here: so any head can collaborate, the backbone's own as well, and as the second one begins at zero, nothing changes
    at first.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(num_classes, _EMBEDDING), nn.BatchNorm1d(_EMBEDDING), nn.ReLU())
        self.classifier = nn.Linear(_EMBEDDING, num_classes, bias=False)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, logits: Tensor) -> Tensor:
        """Logits of the previous exit, (N, classes) -> what is added to this one's."""
        added: Tensor = self.classifier(self.embed(logits))
        return added


def early_exits(kind: HeadKind, backbone: nn.Module, blocks: tuple[fx.GraphModule, ...]) -> list[PooledExit | ConvExit]:
    """A head for what every block but the last hands on, on the backbone's device and in its type.

    Raises:
        ValueError: another kind, features that it does not suit, or in which channels and positions look alike.
    """
    classes, like = int(backbone.num_classes), next(backbone.parameters())  # type: ignore[arg-type]
    made = [make_exit(kind, layout, classes, backbone) for layout in layouts(backbone, blocks)]
    return [exit.to(like.device, like.dtype) for exit in made]


def make_exit(kind: HeadKind, layout: Layout, num_classes: int, backbone: nn.Module) -> PooledExit | ConvExit:
    """The head of an early exit.

    Raises:
        ValueError: another kind, or one that the features do not suit.
    """
    if kind not in ("pool", "conv"):
        raise ValueError(f"head must be 'pool' or 'conv', got {kind!r}.")
    if kind == "conv":
        return ConvExit(layout, num_classes)
    return PooledExit(layout, num_classes, normalise=not any(isinstance(m, _BatchNorm) for m in backbone.modules()))


def _conv_bn_relu(channels: int, width: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(width), nn.ReLU()


def _like(old: nn.Module, new: Any) -> Any:
    """On the device and in the type of what it replaces."""
    like = next(old.parameters(), None)
    return new if like is None else new.to(like.device, like.dtype)
