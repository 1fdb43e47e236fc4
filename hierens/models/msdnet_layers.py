"""The layers of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844): a grid of layers at several scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

Maps = list[Tensor]  # feature maps (N, C, H, W), from the finest scale to the coarsest


class ConvBnRelu(nn.Sequential):
    """A convolution without bias, batch norm and ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        """Take the number of input and output channels, the size of the kernel, and the stride."""
        conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _bottleneck(channels: int, width: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 convolution to at most `factor` times `width` channels, and a 3x3 convolution to `width`."""
    inner = min(channels, factor * width)
    return nn.Sequential(ConvBnRelu(channels, inner, 1), ConvBnRelu(inner, width, 3, stride))


@dataclass(frozen=True)
class Widths:
    """The widths of a network.

    Attributes:
        scales: g, the width of each scale in relation to the finest.
        bottlenecks: b, the width of a bottleneck in relation to its output, for each scale that it reads.
        growth: k, the number of channels that a layer adds at the finest scale.
    """

    scales: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    growth: int


class Layer(nn.Module):
    """A layer of the grid: each scale keeps its input and gets new features from it and from the next finer scale."""

    def __init__(self, widths: Widths, channels: int, scales_in: int, scales_out: int) -> None:
        """Create a layer.

        Args:
            widths: of the network.
            channels: of the input, in relation to the widths of the scales.
            scales_in: number of scales that the layer reads.
            scales_out: number of scales that it writes, the coarsest ones; at most one less.
        """
        super().__init__()
        first = len(widths.scales) - scales_in
        self.dropped = scales_in - scales_out
        self.plain, self.strided = nn.ModuleList(), nn.ModuleList()
        for scale in range(first + self.dropped, len(widths.scales)):
            finest = scale == first
            width = widths.growth * widths.scales[scale] // (1 if finest else 2)
            self.plain.append(_bottleneck(channels * widths.scales[scale], width, widths.bottlenecks[scale]))
            if not finest:
                above = scale - 1
                self.strided.append(_bottleneck(channels * widths.scales[above], width, widths.bottlenecks[above], 2))

    def forward(self, maps: Maps) -> Maps:
        """The maps of each scale, with their new features after their inputs."""
        kept = maps[self.dropped :]
        new = [[x, plain(x)] for x, plain in zip(kept, self.plain, strict=True)]
        for features, finer, strided in zip(new[len(new) - len(self.strided) :], maps, self.strided, strict=False):
            features.append(strided(finer))
        return [torch.cat(features, 1) for features in new]


class Transition(nn.Module):
    """A 1x1 convolution at each scale that halves the channels."""

    def __init__(self, widths: Sequence[int], channels: int, reduced: int) -> None:
        """Take the widths of the scales that are left, and the number of channels before and after."""
        super().__init__()
        self.convs = nn.ModuleList(ConvBnRelu(channels * width, reduced * width, 1) for width in widths)

    def forward(self, maps: Maps) -> Maps:
        """The maps with fewer channels."""
        return [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


class Stem(nn.Module):
    """The first convolution, and one of stride 2 for each coarser scale."""

    def __init__(self, in_chans: int, widths: Sequence[int], large: bool) -> None:
        """Take the image channels, the width of each scale, and whether the first convolution is for large images."""
        super().__init__()
        pool = [nn.MaxPool2d(3, 2, 1)] if large else []
        first = ConvBnRelu(in_chans, widths[0], 7 if large else 3, 2 if large else 1)
        coarser = (ConvBnRelu(finer, width, 3, 2) for finer, width in pairwise(widths))
        self.scales = nn.ModuleList([nn.Sequential(*first, *pool), *coarser])

    def forward(self, x: Tensor) -> Maps:
        """The maps of all scales, from images (N, C, H, W)."""
        maps = []
        for scale in self.scales:
            x = scale(x)
            maps.append(x)
        return maps


class Classifier(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU, pooling and a linear layer."""

    def __init__(self, channels: int, width: int, num_classes: int, drop_rate: float = 0.0) -> None:
        """Take the channels that it reads, those of its convolutions, the number of classes, and the dropout rate."""
        super().__init__()
        self.convs = nn.Sequential(ConvBnRelu(channels, width, 3, 2), ConvBnRelu(width, width, 3, 2))
        self.pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module
        self.width = width
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer by a new one; by none for 0 classes."""
        self.fc = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, classes), or pooled features, from the map of the coarsest scale."""
        x = self.drop(self.pool(self.convs(x)))
        return x if pre_logits else self.fc(x)


def dense_blocks(
    widths: Widths, channels: int, depths: Sequence[int], reduction: float
) -> Iterator[tuple[nn.Sequential, int]]:
    """The blocks of an MSDNet, each with the number of channels of its coarsest map.

    Args:
        widths: of layers and bottlenecks.
        channels: of the stem at the finest scale.
        depths: layers of each block.
        reduction: share of the channels that is kept where a scale ends: after every third of the layers, if there are
            three scales.
    """
    interval = math.ceil(sum(depths) / len(widths.scales))
    scales_in, layer = len(widths.scales), 0
    for depth in depths:
        parts: list[nn.Module] = []
        for _ in range(depth):
            scales_out = len(widths.scales) - layer // interval
            parts.append(Layer(widths, channels, scales_in, scales_out))
            channels, layer = channels + widths.growth, layer + 1
            if scales_out < scales_in:
                reduced = math.floor(reduction * channels)
                parts.append(Transition(widths.scales[-scales_out:], channels, reduced))
                channels, scales_in = reduced, scales_out
        yield nn.Sequential(*parts), channels * widths.scales[-1]
