"""Load for benchmarks/serving.py, in a process of its own: requests that keep to a timetable, whatever becomes of them.

A latency counts from the moment at which a request was due, not from when this process came to send it.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tyro
from PIL import Image

BOUNDARY = "0123456789boundary"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@dataclass(frozen=True)
class Settings:
    """What the load is."""

    url: str
    """of /predict"""
    images: str
    """an .npy file of grey images (N, H, W)"""
    output: str
    """a line of JSON per request goes here"""
    phases: tuple[tuple[float, float], ...] = ()
    """seconds and requests per second, one after another; Poisson arrivals"""
    workers: int = 0
    """in place of phases: so many clients, each sending as soon as it is answered"""
    seconds: float = 10
    """of the workers"""
    per_request: int = 4
    """images"""
    timeout_s: float = 10
    """a request is given up after"""
    seed: int = 0
    """of arrivals"""


def bodies(images: np.ndarray, per_request: int) -> list[bytes]:
    """The images as PNGs in forms, made beforehand; request i holds images i * per_request and the next ones."""
    top = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'.encode()
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(top + buffer.getvalue() + b"\r\n")
    end = f"--{BOUNDARY}--\r\n".encode()
    whole = range(0, len(files) - per_request + 1, per_request)
    return [b"".join(files[at : at + per_request]) + end for at in whole]


async def ask(client: httpx.AsyncClient, url: str, index: int, body: bytes, due: float, start: float) -> dict[str, Any]:
    """One request, and all that came of it."""
    row: dict[str, Any] = {"index": index, "due": due - start, "status": 0}
    try:
        response = await client.post(url, content=body, headers=HEADERS)
        row |= {"status": response.status_code, "reply": response.json()}
    except (httpx.HTTPError, ValueError) as error:
        row["error"] = type(error).__name__
    return row | {"ms": 1e3 * (time.perf_counter() - due)}


async def timetable(settings: Settings, client: httpx.AsyncClient, sent: list[bytes]) -> list[dict[str, Any]]:
    """Open loop: Poisson arrivals."""
    draw, tasks, due = random.Random(settings.seed), [], 0.0
    start, end = time.perf_counter() + 0.1, 0.0
    for seconds, rate in settings.phases:
        end += seconds
        due = max(due, end - seconds)
        while (due := due + draw.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            index = len(tasks) % len(sent)
            tasks.append(asyncio.create_task(ask(client, settings.url, index, sent[index], start + due, start)))
    return list(await asyncio.gather(*tasks))


async def workers(settings: Settings, client: httpx.AsyncClient, sent: list[bytes]) -> list[dict[str, Any]]:
    """Closed loop: as much as is answered."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    async def work() -> None:
        while (now := time.perf_counter()) < start + settings.seconds:
            index = len(rows) % len(sent)
            rows.append(await ask(client, settings.url, index, sent[index], now, start))

    await asyncio.gather(*(work() for _ in range(settings.workers)))
    return rows


async def main(settings: Settings) -> None:
    """Run, and write what came back."""
    sent = bodies(np.load(settings.images), settings.per_request)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    async with httpx.AsyncClient(timeout=settings.timeout_s, limits=limits) as client:
        rows = await (workers if settings.workers else timetable)(settings, client, sent)
    Path(settings.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    asyncio.run(main(tyro.cli(Settings, description=__doc__)))
