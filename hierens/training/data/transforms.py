"""From a PIL image to a normalised tensor, by timm's or by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T

from hierens.training.config import DataConfig


def create_transform(config: DataConfig, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """A PIL image -> a normalised tensor (C, H, W)."""
    channels, height, width = config.input_size
    mean, std = (_per_channel(values, channels) for values in (config.mean, config.std))
    if config.augment == "imagenet":
        return timm.data.create_transform(
            config.input_size,
            is_training=training,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            interpolation=config.interpolation,
            crop_pct=config.crop_pct,
            mean=mean,
            std=std,
        )
    steps: list[Any] = [_Fit((height, width), config.pad, T.InterpolationMode(config.interpolation))]
    if training and config.augment == "crop_flip":
        steps.append(T.RandomCrop((height, width), padding=config.pad))
        steps.append(T.RandomHorizontalFlip(config.hflip))
    steps += [T.ToTensor(), T.Normalize(mean, std)]
    if training and config.random_erasing:
        steps.append(RandomErasing(config.random_erasing, mode="const", device="cpu"))
    return T.Compose(steps)


class _Fit:
    """Bring an image to a size: by zero padding if it is slightly smaller, otherwise by resizing.

    28x28 Fashion-MNIST is thus padded to 32x32, as is common.
    """

    def __init__(self, size: tuple[int, int], margin: int, interpolation: T.InterpolationMode) -> None:
        self.size, self.margin = size, margin
        self.resize = T.Resize(size, interpolation=interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        short = [wanted - own for wanted, own in zip(self.size, (image.height, image.width), strict=True)]
        if all(0 <= missing <= 2 * self.margin for missing in short):
            top, left = short[0] // 2, short[1] // 2
            return T.functional.pad(image, [left, top, short[1] - left, short[0] - top]) if any(short) else image
        return self.resize(image)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"mean and std need 1 or {channels} values for images of {channels} channels, got {values}.")
    return tuple(values) * channels if len(values) == 1 else tuple(values)
