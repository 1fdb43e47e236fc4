"""Heads of exits, for features in any layout, and the backbone's own head and classifiers as exits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hierens.core import timm_info
from hierens.core.adaptive_base import classifier_maker
from hierens.core.modes import evaluating
from hierens.core.timm_info import example_input

HeadKind = Literal["pool", "conv"]
_CONV_WIDTH = 128  # channels of a convolutional head, as in MSDNet; less where they would dominate the cost


@dataclass(frozen=True)
class Layout:
    """The layout of the features at a cut.

    Attributes:
        kind: `NCHW` and `NHWC` are feature maps, `NLC` are tokens, `NC` is pooled already.
        channels: number of channels.
        prefix: number of tokens in front that belong to no position, such as a class token.
        class_token: whether the first token represents the image, as for the backbone's own classifier.
        part: index of the features if several values cross the cut; None if a single tensor does.
    """

    kind: Literal["NCHW", "NHWC", "NLC", "NC"]
    channels: int
    prefix: int = 0
    class_token: bool = False
    part: int | None = None

    def features(self, value: Any) -> Tensor:
        """The features among the values that cross the cut."""
        found: Tensor = value if self.part is None else value[self.part]
        return found

    def pooled(self, value: Any) -> Tensor:
        """Pooled features, (N, channels)."""
        x = self.features(value)
        if self.kind == "NC":
            return x
        if self.kind == "NLC":
            return x[:, 0] if self.class_token else x[:, self.prefix :].mean(1)
        return x.mean((2, 3) if self.kind == "NCHW" else (1, 2))

    def maps(self, images: Tensor, value: Any) -> Tensor:
        """Feature maps (N, channels, H, W) of images, without the tokens in front."""
        x = self.features(value)
        if self.kind == "NLC":
            x = x[:, self.prefix :]
            rows = math.isqrt(x.shape[1] * images.shape[2] // images.shape[3])
            return x.transpose(1, 2).unflatten(2, (rows, -1))
        return x.permute(0, 3, 1, 2) if self.kind == "NHWC" else x


def layouts(backbone: nn.Module, blocks: tuple[nn.Module, ...]) -> list[tuple[Layout, Any]]:
    """The layout of the output of every block, and this output for two images, determined by running the blocks.

    Raises:
        ValueError: channels and positions of some features cannot be distinguished.
    """
    example = example_input(backbone, 2)
    found = []
    for index, value in enumerate(_outputs(blocks, example)):
        part, x = _features_of(value, index)
        found.append((_ShapeReader(backbone, blocks, example, index, part).layout(x), value))
    return found


@torch.no_grad()
def _outputs(blocks: tuple[nn.Module, ...], example: Tensor) -> list[Any]:
    value: Any = example
    values = []
    for block in blocks:
        with evaluating(block):
            value = block(*value) if isinstance(value, tuple) else block(value)
        values.append(value)
    return values


def _features_of(value: Any, index: int) -> tuple[int | None, Tensor]:
    """The one tensor with an entry per image (two here) among the values that cross, and its index."""
    if isinstance(value, Tensor):
        return None, value
    parts = [
        (place, part)
        for place, part in enumerate(value)
        if isinstance(part, Tensor) and part.ndim > 1 and len(part) == 2 and part.is_floating_point()
    ]
    if len(parts) != 1:
        raise ValueError(
            f"{len(parts)} feature tensors cross after block {index}, and an exit reads one: cut elsewhere by at=[...] "
            "(hierens.cut_points lists the possible cuts and the values that cross them)."
        )
    return parts[0]


@dataclass(frozen=True)
class _ShapeReader:
    """Distinguishes channels and positions of the features after a block by their sizes."""

    backbone: nn.Module
    blocks: tuple[nn.Module, ...]
    example: Tensor
    index: int
    part: int | None

    def layout(self, x: Tensor) -> Layout:
        if x.ndim == 2:
            return Layout("NC", x.shape[1], part=self.part)
        if x.ndim == 3:
            return self._tokens(x)
        if x.ndim != 4:
            raise ValueError(f"{self._described(x)} have {x.ndim} dimensions: cut elsewhere by at=[...].")
        _, a, b, c = x.shape
        first, last = self._is_grid(b, c), self._is_grid(a, b)  # whether this dimension can hold the channels
        if first and last:
            first, last = self._by_another_size(x)
        if first == last:
            raise ValueError(
                f"{self._described(x)} do not show which dimension holds the channels: cut elsewhere by at=[...]."
            )
        return Layout("NCHW", a, part=self.part) if first else Layout("NHWC", c, part=self.part)

    def _tokens(self, x: Tensor) -> Layout:
        height, width = self.example.shape[2:]
        class_token = getattr(self.backbone, "global_pool", None) == "token"
        for prefix in (int(getattr(self.backbone, "num_prefix_tokens", 0) or 0), 0, 1):  # only timm states it
            positions = x.shape[1] - prefix
            rows = math.isqrt(max(positions, 0) * height // width)
            if rows and positions % rows == 0 and self._is_grid(rows, positions // rows):
                return Layout("NLC", x.shape[2], prefix, class_token and prefix > 0, self.part)
        raise ValueError(
            f"{self._described(x)} are not a grid of tokens (N, positions, channels): cut elsewhere by at=[...]."
        )

    def _is_grid(self, rows: int, columns: int) -> bool:
        """Whether these can be the height and width of a feature map, which has the image's aspect ratio."""
        height, width = self.example.shape[2:]
        return abs(rows / columns - height / width) <= height / width * 0.5 / min(rows, columns)

    def _by_another_size(self, x: Tensor) -> tuple[bool, bool]:
        """Whether the first or the last dimension is independent of the image size; if that is fixed, timm's format."""
        try:
            larger = torch.nn.functional.interpolate(self.example, scale_factor=2)
            value = _outputs(self.blocks[: self.index + 1], larger)[-1]
            resized = value if self.part is None else value[self.part]
            return resized.shape[1] == x.shape[1], resized.shape[3] == x.shape[3]
        except Exception:
            output_format = str(getattr(self.backbone, "output_fmt", ""))
            return "NCHW" in output_format, "NHWC" in output_format

    def _described(self, x: Tensor) -> str:
        return f"the features of shape {tuple(x.shape)} after block {self.index} of this {type(self.backbone).__name__}"


class BackboneExit(nn.Module):
    """A classifier of the backbone itself, such as MSDNet's, that reads the last of the values that cross a cut.

    Args:
        classifier: from features to logits, with a linear layer `fc`, the number of its inputs `width`, and `reset`.
    """

    names = ("fc",)
    part = -1

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier: Any = classifier
        self.channels: int = classifier.width  # type: ignore[assignment]

    def forward(self, value: Any) -> Tensor:
        """Logits (N, classes) from the values that cross the cut."""
        logits: Tensor = self.classifier(value[self.part] if isinstance(value, tuple) else value)
        return logits

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer by a new one."""
        old = self.classifier.fc
        self.classifier.reset(num_classes)
        self.classifier.fc = _like(old, self.classifier.fc)


class PooledExit(nn.Module):
    """Global pooling, a layer norm if the backbone has no batch norms that fix the scale, and a linear layer.

    Args:
        layout: of the features.
        num_classes: number of classes.
        normalise: whether to add the layer norm.
    """

    names = ("",)

    def __init__(self, layout: Layout, num_classes: int, normalise: bool) -> None:
        super().__init__()
        self.layout, self.part = layout, layout.part
        self.norm = nn.LayerNorm(layout.channels) if normalise else nn.Identity()
        self.classifier = nn.Linear(layout.channels, num_classes)

    def forward(self, value: Any) -> Tensor:
        """Logits (N, classes) from the values that cross the cut."""
        logits: Tensor = self.classifier(self.norm(self.layout.pooled(value)))
        return logits

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a new one."""
        self.classifier = _like(self.classifier, nn.Linear(self.layout.channels, num_classes))


class ConvExit(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU, global pooling and a linear layer, as MSDNet's exits.

    Args:
        layout: of the features, which must be maps (N, C, H, W).
        num_classes: number of classes.

    Raises:
        ValueError: the features have another layout.
    """

    names = ("",)

    def __init__(self, layout: Layout, num_classes: int) -> None:
        super().__init__()
        if layout.kind != "NCHW":
            raise ValueError(f"head='conv' takes maps (N, C, H, W), and these features are {layout.kind}: use 'pool'.")
        self.layout, self.part = layout, layout.part
        width = min(_CONV_WIDTH, 2 * layout.channels)
        self.convs = nn.Sequential(*_conv_bn_relu(layout.channels, width), *_conv_bn_relu(width, width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, value: Any) -> Tensor:
        """Logits (N, classes) from the values that cross the cut."""
        logits: Tensor = self.classifier(self.convs(self.layout.features(value)).mean((2, 3)))
        return logits

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a new one."""
        self.classifier = _like(self.classifier, nn.Linear(self.classifier.in_features, num_classes))


class OwnExit(nn.Module):
    """The backbone's own head and classifier: the last exit.

    Args:
        head: the layers from the features to the classifier.
        classifier: the last linear layers and everything after them.
        names: of the last linear layers in `classifier`.
        features: number of their input channels.
    """

    def __init__(self, head: fx.GraphModule, classifier: fx.GraphModule, names: tuple[str, ...], features: int) -> None:
        super().__init__()
        self.head, self.classifier, self.names, self.channels = head, classifier, names, features

    def forward(self, value: Any) -> Tensor:
        """Logits (N, classes) from the output of the last block."""
        pooled = self.head(*value) if isinstance(value, tuple) else self.head(value)
        logits: Tensor = self.classifier(*pooled) if isinstance(pooled, tuple) else self.classifier(pooled)
        return logits

    def reset(self, num_classes: int) -> None:
        """Replace the last linear layers by new ones."""
        for name in self.names:
            old = self.classifier.get_submodule(name)
            owner, _, key = name.rpartition(".")
            make: Callable[[int], nn.Module] = classifier_maker(old, self.channels)
            setattr(self.classifier.get_submodule(owner), key, _like(old, make(num_classes)))


Exit = PooledExit | ConvExit | BackboneExit | OwnExit


def new_exits(kind: HeadKind, backbone: nn.Module, blocks: tuple[fx.GraphModule, ...]) -> list[PooledExit | ConvExit]:
    """A head for the output of every block but the last, on the backbone's device and in its data type.

    Raises:
        ValueError: an unknown kind, features that it cannot read, or whose channels and positions cannot be
            distinguished.
    """
    classes, like = timm_info.num_classes(backbone), next(backbone.parameters())
    exits = [new_exit(kind, layout, classes, backbone) for layout, _ in layouts(backbone, blocks[:-1])]
    return [exit.to(like.device, like.dtype) for exit in exits]


def new_exit(kind: HeadKind, layout: Layout, num_classes: int, backbone: nn.Module) -> PooledExit | ConvExit:
    """A head for features of a layout.

    Raises:
        ValueError: an unknown kind, or one that cannot read the features.
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
    """The new module, on the device and in the data type of the old one."""
    like = next(old.parameters(), None)
    return new if like is None else new.to(like.device, like.dtype)
