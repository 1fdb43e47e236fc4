"""Checks the type, number and range of an untrusted config's values on images and classes.

They are not needed to build the network, but to create an example input, to prepare images and to name classes. They
are checked when the config is read, so that the error message can name the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, short

_LARGEST_SIDE = 2**16
_MOST_ELEMENTS = 2**23  # of an image: 3 x 1672 x 1672; the largest of timm are 3 x 1024 x 1024
_MOST_TEXT, _MOST_TAGS = 2**16, 256
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROPS = ("center", "squash", "border")


class _Field(NamedTuple):
    """The values that are allowed in a field of timm's `pretrained_cfg`, as a function and as text."""

    fits: Callable[[Any, int], bool]
    """given a value and the number of channels"""
    allowed: str


def _is_size(value: Any, channels: int) -> bool:
    sides = isinstance(value, (list, tuple)) and len(value) == 3 and all(is_whole(n, 1, _LARGEST_SIDE) for n in value)
    return sides and math.prod(value) <= _MOST_ELEMENTS


def _is_own_size(value: Any, channels: int) -> bool:
    return _is_size(value, channels) and value[0] == channels


def _is_pool_size(value: Any, channels: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_whole(n, 1, _LARGEST_SIDE) for n in value)


def _per_channel(least: float, most: float) -> Callable[[Any, int], bool]:
    def fits(value: Any, channels: int) -> bool:
        counted = isinstance(value, (list, tuple)) and len(value) in (1, channels)
        return counted and all(is_finite(number, least, most) for number in value)

    return fits


def _is_share(value: Any, channels: int) -> bool:
    return is_finite(value, 0.01, 10)


def _is_text(value: Any, channels: int) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _are_tags(value: Any, channels: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= _MOST_TAGS and all(_is_text(tag, 0) for tag in value)


_SIZE = f"three whole numbers (C, H, W) with a product of at most {_MOST_ELEMENTS}"
_SHARE = _Field(_is_share, "a number from 0.01 to 10")
_TEXT = _Field(_is_text, f"a text of at most {_MOST_TEXT} characters")
# Fields on the preparation of images. The other fields of timm's `pretrained_cfg` can name files and URLs to load from.
_FIELDS = {
    "input_size": _Field(_is_own_size, f"{_SIZE}, C being in_chans"),
    "test_input_size": _Field(_is_size, _SIZE),
    "min_input_size": _Field(_is_size, _SIZE),
    "fixed_input_size": _Field(lambda value, _: isinstance(value, bool), "true or false"),
    "pool_size": _Field(_is_pool_size, f"two whole numbers from 1 to {_LARGEST_SIDE}"),
    "mean": _Field(_per_channel(-1000, 1000), "one number from -1000 to 1000, or one per channel"),
    "std": _Field(_per_channel(1e-6, 1000), "one number from 1e-6 to 1000, or one per channel"),
    "interpolation": _Field(lambda value, _: value in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    "crop_pct": _SHARE,
    "test_crop_pct": _SHARE,
    "crop_mode": _Field(lambda value, _: value in _CROPS, f"one of {', '.join(_CROPS)}"),
    "tags": _Field(_are_tags, f"a list of at most {_MOST_TAGS} texts"),
    **dict.fromkeys(("license", "description", "paper_name"), _TEXT),
}


def description(found: Any, channels: int, file: Path) -> dict[str, Any]:
    """The fields of a config's `pretrained_cfg` that hierens uses; those that are null keep the backbone's values.

    Args:
        found: the config's `pretrained_cfg`.
        channels: of the model's images.
        file: for messages.

    Raises:
        LoadError: a field has a value that is not allowed.
    """
    if not isinstance(found, dict | None):
        raise LoadError(f"{file} has no usable pretrained_cfg (got {short(found)}): it must hold fields by name.")
    kept = {key: value for key, value in (found or {}).items() if key in _FIELDS and value is not None}
    for key, value in kept.items():
        if wrong := unusable(key, value, channels):
            raise LoadError(f"{file} has no usable {key}: {wrong}.")
    return kept


def unusable(key: str, value: Any, channels: int) -> str:
    """A description of a field's value and of the allowed ones; empty if the value is allowed."""
    field = _FIELDS[key]
    return "" if field.fits(value, channels) else f"got {short(value)}, allowed is {field.allowed}"


def check_labels(config: Mapping[str, Any], num_classes: int, file: Path) -> None:
    """Check that a config's class names, if there are any, are text.

    Raises:
        LoadError: they are not.
    """
    names = config.get("label_names")
    if isinstance(names, dict):
        wrong = next((key for key in names if not _is_index(key, num_classes)), None)
        if wrong is not None:
            raise LoadError(
                f"{file} has no usable label_names: {short(wrong)} is not an index of {num_classes} classes."
            )
    described = config.get("label_descriptions")
    for key, texts in (("label_names", names), ("label_descriptions", described)):
        for text in texts.values() if isinstance(texts, dict) else texts or ():
            if not _is_text(text, 0) and not is_whole(text, 0, num_classes):
                raise LoadError(f"{file} has no usable {key} (got {short(text)}): allowed are texts.")


def _is_index(key: str, num_classes: int) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < num_classes
