"""Load generator of benchmarks/serving.py: sends requests at scheduled times, whether or not earlier ones returned.

A latency is measured from the scheduled time of a request, not from the time at which it was sent.
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
    """Settings of the load generator."""

    url: str
    """URL of /predict"""
    images: str
    """an .npy file of grey images (N, H, W)"""
    output: str
    """output file, with one line of JSON per request"""
    phases: tuple[tuple[float, float], ...] = ()
    """duration in seconds and requests per second of successive phases; Poisson arrivals"""
    workers: int = 0
    """instead of phases: number of clients, each of which sends its next request when it receives a response"""
    seconds: float = 10
    """duration of a load by workers"""
    per_request: int = 4
    """images per request"""
    timeout_s: float = 10
    """time after which a request is cancelled"""
    seed: int = 0
    """seed of the arrival times"""


def bodies(images: np.ndarray, per_request: int) -> list[bytes]:
    """Bodies of the requests, with PNG images in forms; request i starts with image i * per_request."""
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
    """Send one request and return its record."""
    row: dict[str, Any] = {"index": index, "due": due - start, "status": 0}
    try:
        response = await client.post(url, content=body, headers=HEADERS)
        row |= {"status": response.status_code, "reply": response.json()}
    except (httpx.HTTPError, ValueError) as error:
        row["error"] = type(error).__name__
    return row | {"ms": 1e3 * (time.perf_counter() - due)}


async def timetable(settings: Settings, client: httpx.AsyncClient, sent: list[bytes]) -> list[dict[str, Any]]:
    """Open loop: requests at Poisson arrival times."""
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
    """Closed loop: each worker sends a request when the previous one has returned."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    async def work() -> None:
        while (now := time.perf_counter()) < start + settings.seconds:
            index = len(rows) % len(sent)
            rows.append(await ask(client, settings.url, index, sent[index], now, start))

    await asyncio.gather(*(work() for _ in range(settings.workers)))
    return rows


async def main(settings: Settings) -> None:
    """Run the load and write the records."""
    sent = bodies(np.load(settings.images), settings.per_request)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    async with httpx.AsyncClient(timeout=settings.timeout_s, limits=limits) as client:
        rows = await (workers if settings.workers else timetable)(settings, client, sent)
    Path(settings.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    asyncio.run(main(tyro.cli(Settings, description=__doc__)))
