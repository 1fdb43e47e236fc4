"""Reads untrusted uploads within limits on bytes, seconds and pixels, or refuses them with a status and a message."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from hierens.training.data.decoding import DecodingError, decode

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SMALL = 1024  # maximum bytes of other form fields


class RefusedError(Exception):
    """A refused request: an HTTP status and a message for the client."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


def announced_bytes(request: Request, max_bytes: int) -> int:
    """Check a request's headers before its body is read, and return the maximum size of the body.

    Raises:
        RefusedError: 415, 400 or 413.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise RefusedError(
            415, f"The body must be multipart/form-data with a field `image`, not {media_type[:80] or 'untyped'}."
        )
    length = request.headers.get("content-length")
    if length is None:
        return max_bytes
    if not (length.isascii() and length.isdigit()):
        raise RefusedError(400, "Content-Length is not a number.")
    if len(length) > 15 or int(length) > max_bytes:
        raise RefusedError(413, f"The body is larger than {max_bytes} bytes.")
    return int(length)


async def read_upload(request: Request, max_bytes: int, max_images: int, seconds: float) -> list[bytes]:
    """The files in a form's fields `image`; reads at most `max_bytes` of the body.

    Raises:
        RefusedError: 408, 413, 415 or 400.
        ClientDisconnect: the client has disconnected.
    """
    left = max_bytes

    async def receive() -> Any:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise RefusedError(413, f"The body is larger than {max_bytes} bytes.")
        return message

    try:
        async with asyncio.timeout(seconds):
            form = await Request(request.scope, receive).form(max_files=max_images, max_fields=4, max_part_size=_SMALL)
    except TimeoutError:
        raise RefusedError(408, f"The body did not arrive within {seconds:g} seconds.") from None
    except HTTPException as error:
        raise RefusedError(400, f"The form cannot be read: {error.detail.rstrip('.')}.") from error
    except (RefusedError, ClientDisconnect):
        raise
    except Exception as error:  # multipart parsers raise other errors as well
        raise RefusedError(400, "The form cannot be read.") from error
    try:
        uploads = [part for part in form.getlist("image") if isinstance(part, UploadFile)]
        if not uploads:
            raise RefusedError(400, "The form has no file in a field `image`.")
        for upload in uploads:
            if (upload.content_type or "image/").partition("/")[0] not in ("image", "application"):
                raise RefusedError(415, f"A field `image` holds {upload.content_type!r:.80}, not an image.")
        return [await upload.read() for upload in uploads]
    finally:
        await form.close()


def read_image(data: bytes, mode: Literal["L", "RGB"], max_pixels: int) -> Image.Image:
    """Decode an image, as in training.

    Args:
        data: the file.
        mode: greyscale or colour.
        max_pixels: maximum of height times width, checked in the file's header before decoding.

    Raises:
        RefusedError: 400 if it is not a complete image of `FORMATS`, 413 if it has too many pixels.
    """
    if not data:
        raise RefusedError(400, "The image is empty.")
    try:
        return decode(data, mode, max_pixels, FORMATS)
    except DecodingError as error:
        raise RefusedError(413 if error.too_large else 400, f"The image is refused: {error}.") from error
