"""What a stranger's config tells of images and classes: values of the right type, number and range, or one sentence.

Nothing of it is needed to build the network, and all of it is used later: to size an example, to prepare images, to
name answers. So it is looked at when the config is read, where the file can still be named.
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
    """What is allowed in a field of timm's description, tested and in words."""

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
# What tells how images are prepared. The rest of timm's description can name files and addresses to load from.
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
    """The fields of timm's description that hierens takes from a config; what is null there is left to the backbone.

    Args:
        found: the config's `pretrained_cfg`.
        channels: that the model's images have.
        file: for messages.

    Raises:
        LoadError: a field has a value that it cannot have.
    """
    if not isinstance(found, dict | None):
        raise LoadError(f"{file} has no usable pretrained_cfg (got {short(found)}): it should hold fields by name.")
    kept = {key: value for key, value in (found or {}).items() if key in _FIELDS and value is not None}
    for key, value in kept.items():
        if wrong := unusable(key, value, channels):
            raise LoadError(f"{file} has no usable {key}: {wrong}.")
    return kept


def unusable(key: str, value: Any, channels: int) -> str:
    """What a field of the description got in place of what is allowed; empty if that is allowed."""
    field = _FIELDS[key]
    return "" if field.fits(value, channels) else f"got {short(value)}, allowed is {field.allowed}"


def check_labels(config: Mapping[str, Any], num_classes: int, file: Path) -> None:
    """See that a config's names of classes, if there are any, are names.

    Raises:
        LoadError: they are something else.
    """
    names = config.get("label_names")
    if isinstance(names, dict):
        wrong = next((key for key in names if not _is_index(key, num_classes)), None)
        if wrong is not None:
            raise LoadError(f"{file} has no usable label_names: {short(wrong)} is no index of {num_classes} classes.")
    described = config.get("label_descriptions")
    for key, texts in (("label_names", names), ("label_descriptions", described)):
        for text in texts.values() if isinstance(texts, dict) else texts or ():
            if not _is_text(text, 0) and not is_whole(text, 0, num_classes):
                raise LoadError(f"{file} has no usable {key} (got {short(text)}): allowed are texts.")


def _is_index(key: str, num_classes: int) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < num_classes
