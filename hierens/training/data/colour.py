"""Warns if images that are read as grey have colours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image

_CHECKED, _SIDE = 8, 64  # images, and pixels per side
_DIFFERENCE = 24  # between a pixel's channels, from 0 to 255; in a grey image, JPEG causes smaller ones


def warn_of_lost_colours(dataset: Any) -> None:
    """Warn once if one of the first images of a map-style data set of timm or torchvision has colours."""
    if any(_has_colours(dataset, index) for index in range(min(len(dataset), _CHECKED))):
        warnings.warn(
            "the images have colours, and input_size has 1 channel: they are read as grey. For colours use 3 channels.",
            stacklevel=2,
        )


def _has_colours(dataset: Any, index: int) -> bool:
    try:
        found = dataset.reader[index][0] if isinstance(dataset, timm.data.ImageDataset) else dataset[index][0]
        if isinstance(found, Image.Image):
            return _is_coloured(found)
        with open(found, "rb") if isinstance(found, Path) else found as file, Image.open(file) as image:
            image.draft("RGB", (_SIDE, _SIDE))  # decode a JPEG at reduced size
            return _is_coloured(image)
    except Exception:  # an image that cannot be read is counted later
        return False


def _is_coloured(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        return False
    pixels = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE)), np.int16)
    return bool(np.ptp(pixels, axis=-1).max() > _DIFFERENCE)
