"""Uploads of about twenty kinds that a server must refuse and survive, sent through raw sockets."""

from __future__ import annotations

import io
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

BOUNDARY = b"0123456789boundary"
REFUSED = frozenset({400, 413, 415, 422})
CLOSED = 0  # in place of a status: the server hung up without one
Send = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Case:
    """An upload, and the statuses that the server may respond with."""

    name: str
    payload: bytes
    expected: frozenset[int]
    hang_up: bool = False


@dataclass(frozen=True)
class Found:
    """The response."""

    status: int
    body: bytes


def cases(count: int, max_bytes: int, seed: int = 0) -> Iterator[Case]:
    """`count` uploads, the kinds in turn, each drawn by the seed."""
    draw = random.Random(seed)
    for number in range(count):
        yield KINDS[number % len(KINDS)](draw, max_bytes)


def send(host: str, port: int, case: Case, seconds: float = 15) -> Found:
    """Send an upload as it is, byte by byte, and read the status."""
    received = b""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        try:
            connection.sendall(case.payload)
            if case.hang_up:
                return Found(CLOSED, b"")
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent: the answer may be there
        try:
            while chunk := connection.recv(65536):
                received += chunk
                top, _, body = received.partition(b"\r\n\r\n")
                length = next((int(x[15:]) for x in top.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
                if b"\r\n\r\n" in received and len(body) >= length:
                    break
        except ConnectionResetError:
            pass
    if not received.startswith(b"HTTP/1.1 "):
        return Found(CLOSED, received)
    return Found(int(received.split()[1]), received.partition(b"\r\n\r\n")[2])


def head(length: int | None, media_type: bytes | None = None, extra: bytes = b"", path: bytes = b"/predict") -> bytes:
    """A request's first lines."""
    media_type = b"multipart/form-data; boundary=" + BOUNDARY if media_type is None else media_type
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    lines = (b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: " + media_type, size, extra)
    return b"\r\n".join(line for line in lines if line) + b"\r\n\r\n"


def form(data: bytes, field: bytes = b"image", media_type: bytes = b"image/png") -> bytes:
    """A body with one file."""
    top = b'Content-Disposition: form-data; name="' + field + b'"; filename="x.png"\r\nContent-Type: ' + media_type
    return b"--" + BOUNDARY + b"\r\n" + top + b"\r\n\r\n" + data + b"\r\n--" + BOUNDARY + b"--\r\n"


def upload(data: bytes, **options: bytes) -> bytes:
    """A whole request."""
    body = form(data, **options)
    return head(len(body)) + body


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has a few bytes of pixels."""
    top = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + top + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")


def png_bomb(width: int, height: int) -> bytes:
    """A valid PNG, a thousandth as large as its pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    top = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + top + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG with a compressed comment of 100 MB."""
    packer = zlib.compressobj(9)
    text = b"Comment\0\0" + b"".join(packer.compress(bytes(1_000_000)) for _ in range(100)) + packer.flush()
    image = _image(random.Random(0), 8)
    return image[:33] + png_chunk(b"zTXt", text) + image[33:]


def _image(draw: random.Random, side: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _case(name: str, payload: bytes, *expected: int, hang_up: bool = False) -> Case:
    return Case(name, payload, frozenset(expected) or REFUSED, hang_up)


def _truncated(draw: random.Random, _: int) -> Case:
    data = _image(draw, 64, draw.choice(["PNG", "JPEG", "WEBP", "BMP"]))
    return _case("truncated image", upload(data[: draw.randrange(10, len(data) // 2)]), 400)


def _noise(draw: random.Random, _: int) -> Case:
    return _case("noise", upload(draw.randbytes(draw.randrange(1, 5000))), 400)


def _damaged(draw: random.Random, _: int) -> Case:
    data = bytearray(_image(draw, 64))
    data[41:] = draw.randbytes(len(data) - 41)  # a right header, then noise
    return _case("damaged image", upload(bytes(data)), 400)


def _large(draw: random.Random, _: int) -> Case:
    return _case("100 megapixels in the header", upload(png_header(10_000, 10_000 + draw.randrange(1000))), 413)


def _empty(draw: random.Random, _: int) -> Case:
    return _case("empty", upload(b"") if draw.random() < 0.5 else head(0), 400)


def _field(draw: random.Random, _: int) -> Case:
    return _case("wrong field", upload(_image(draw, 8), field=b"file"), 400)


def _media_type(draw: random.Random, _: int) -> Case:
    kind = draw.choice([b"application/json", b"image/png", b"text/plain", b"application/x-www-form-urlencoded"])
    body = _image(draw, 8)
    return _case("wrong media type", head(len(body), kind) + body, 415)


def _part_type(draw: random.Random, _: int) -> Case:
    return _case("a text in the field", upload(b"hello", media_type=b"text/plain"), 415)


def _announced(draw: random.Random, _: int) -> Case:
    return _case("gigantic Content-Length", head(draw.choice([10**9, 10**12, 10**18])), 413)


def _long(draw: random.Random, max_bytes: int) -> Case:
    return _case("larger than allowed", upload(bytes(max_bytes + draw.randrange(1, 10**6))), 413)


def _chunked(draw: random.Random, max_bytes: int) -> Case:
    body = form(bytes(2 * max_bytes + 10**6))
    pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
    chunks = b"".join(b"%x\r\n" % len(piece) + piece + b"\r\n" for piece in pieces)
    return _case("larger than allowed, in chunks", head(None) + chunks + b"0\r\n\r\n", 413)


def _bomb(draw: random.Random, _: int) -> Case:
    return _case("PNG bomb", upload(png_bomb(5000, 5000 + draw.randrange(100))), 413)


def _text_bomb(draw: random.Random, _: int) -> Case:
    return _case("PNG with a compressed comment of 100 MB", upload(text_bomb()), 400)


def _headers(draw: random.Random, _: int) -> Case:
    body = form(_image(draw, 8))
    extra = b"X-Long: " + b"a" * draw.choice([20_000, 60_000, 200_000])
    return _case("huge header", head(len(body), extra=extra) + body, 400, 431, CLOSED)


def _no_boundary(draw: random.Random, _: int) -> Case:
    body = form(_image(draw, 8))
    return _case("no boundary", head(len(body), b"multipart/form-data") + body, 400)


def _broken_form(draw: random.Random, _: int) -> Case:
    body = draw.randbytes(500)
    return _case("no form", head(len(body)) + body, 400)


def _hung_up(draw: random.Random, _: int) -> Case:
    request = upload(_image(draw, 64))
    return _case("hung up half way", request[: len(request) // 2], CLOSED, hang_up=True)


def _no_http(draw: random.Random, _: int) -> Case:
    return _case("no HTTP", b"\x16\x03\x01" + draw.randbytes(200) + b"\r\n\r\n", 400, CLOSED)


def _many_files(draw: random.Random, _: int) -> Case:
    part = form(_image(draw, 8)).removesuffix(b"--\r\n") + b"\r\n"
    body = part * 40 + b"--" + BOUNDARY + b"--\r\n"
    return _case("many files", head(len(body)) + body, 400)


def _bad_length(draw: random.Random, _: int) -> Case:
    request = head(5).replace(b"Length: 5", b"Length: five")
    return _case("a length that is no number", request + b"hello", 400, CLOSED)


KINDS = [
    _truncated, _noise, _damaged, _large, _empty, _field, _media_type, _part_type, _announced, _long, _chunked, _bomb,
    _text_bomb, _headers, _no_boundary, _broken_form, _hung_up, _no_http, _many_files, _bad_length,
]  # fmt: skip
