"""Decodes image files, in the same way for training, evaluation, predictions, web demo and server."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import IO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from hierens.core.errors import first_line
from hierens.training.config import DataConfig

Source = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image

# Pillow warns of damaged EXIF, transparent palettes and large images. The first two do not change the pixels, and too
# large images are refused. A filter per call would not be thread-safe, and servers have threads.
for _category in (UserWarning, Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")

# Not ImageOps.exif_transpose: it copies upright images, and fails if it cannot rewrite damaged EXIF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow finds an orientation
_FLOAT_SCALES = (1, 255, 65535)


class DecodingError(ValueError):
    """An image cannot be read; the message is a clause, such as "it has 9 x 9 pixels, more than 50".

    Args:
        clause: what is wrong with the image.
        too_large: whether it has too many pixels.
    """

    def __init__(self, clause: str, too_large: bool = False) -> None:
        super().__init__(clause)
        self.too_large = too_large


def decode(
    source: Source,
    mode: Literal["L", "RGB"],
    max_pixels: int = DataConfig.max_pixels,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """An image as input of a model: the first frame, upright, 8 bits per channel.

    EXIF gives the orientation, unless it is damaged. 16-bit grey is scaled, as Pillow scales 16-bit colour, and so are
    32-bit integers above 65535, by their own range. Floats range from 0 to 1, or, if they are larger, to 255 or 65535.
    Values below 0 become 0. The rest is Pillow's `convert(mode)`, as in timm and torchvision, so pretrained models
    receive the pixels they were trained with: transparency is dropped, not blended with a background, and CMYK is
    converted to RGB without a colour profile.

    Args:
        source: a file, its name, its bytes, or an image that Pillow has opened.
        mode: greyscale or colour.
        max_pixels: height times width, checked in the file's header before decoding.
        formats: Pillow's names of the allowed formats; by default all that it knows.

    Raises:
        DecodingError: the file does not exist, is no image, is damaged, or has too many pixels.
    """
    try:
        if isinstance(source, Image.Image):
            return _decoded(source, mode, max_pixels, own=False)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        if hasattr(source, "read"):
            return _decoded(Image.open(source, formats=formats), mode, max_pixels, own=True)
        with open(source, "rb") as file:
            return _decoded(Image.open(file, formats=formats), mode, max_pixels, own=True)
    except DecodingError:
        raise
    except Image.DecompressionBombError as error:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise DecodingError(f"it has more than {limit} pixels", too_large=True) from error
    except UnidentifiedImageError as error:
        known = f"of {', '.join(formats)}" if formats else "of a known format"
        raise DecodingError(f"it is no image {known}") from error
    except Exception as error:  # Pillow's plugins raise all kinds of errors on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise DecodingError(f"it cannot be read ({error.strerror})") from error
        raise DecodingError(f"it is damaged or cut short ({first_line(error)})") from error


def create_decoder(config: DataConfig) -> Callable[[Source], Image.Image]:
    """`decode` with the mode and the pixel limit of a configuration; it raises the same errors."""
    return partial(decode, mode="L" if config.input_size[0] == 1 else "RGB", max_pixels=config.max_pixels)


def _decoded(image: Image.Image, mode: str, max_pixels: int, own: bool) -> Image.Image:
    """A new image, or the same one, without a copy, if it is our `own` and already has the right mode."""
    width, height = image.size
    if width * height > max_pixels:
        raise DecodingError(f"it has {width} x {height} pixels, more than {max_pixels}", too_large=True)
    if image.tell():
        image.seek(0)
    image.load()
    deep = image.mode == "F" or image.mode.startswith("I")
    converted = image if own and image.mode == mode else (_eight_bits(image) if deep else image).convert(mode)
    if image.info.keys().isdisjoint(_ORIENTED_BY):  # Pillow turns TIFFs upright by itself
        return converted
    turn = _TURNS.get(_orientation(image))
    for name in _ORIENTED_BY:  # the image must not be turned again when it is decoded again
        converted.info.pop(name, None)
    return converted if turn is None else converted.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF (or XMP), from 1 to 8; 1 if there is none or it is invalid."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises all kinds of errors
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as 8 bits; Pillow alone would clip values above 255."""
    values = np.asarray(image)
    if image.mode != "F":
        shallow = values >> (8 if values.max() <= 65535 else 23)
    else:
        scale = next((scale for scale in _FLOAT_SCALES if values.max() <= scale), None)
        if scale is None:  # also if a value is NaN
            raise DecodingError(f"its largest value is {values.max():g}, and floats may have at most 65535")
        shallow = np.rint(values * np.float32(255 / scale))
    return Image.fromarray(shallow.clip(0, 255).astype(np.uint8))
