"""The process that accepts requests: checks and decodes uploads, calls the replicas, and records metrics."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.replicas import ReplicaError, Replicas
from service.settings import Settings
from service.uploads import RefusedError, announced_bytes, read_upload

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 2, 5, 10, 30)
AGAIN = {"Retry-After": "1"}
NO_REPLICA = (503, "No replica of the model could answer; try again in a second.", AGAIN)


class Metrics:
    """The metrics of /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hierens_requests", "requests for a prediction, by status", ["status"], **kept)
        self.seconds = Histogram("hierens_answer_seconds", "time from request to response", buckets=SECONDS, **kept)
        self.answers = Counter("hierens_answers", "predicted images, by depth", ["depth"], **kept)
        self.depth = Gauge("hierens_depth", "depth of the latest prediction", **kept)
        self.again = Counter("hierens_second_tries", "requests sent again because their replica died", **kept)
        self.queue = Gauge("hierens_queue", "requests in the service now", **kept)
        self.replicas = Gauge("hierens_replicas", "replicas that have loaded the model", **kept)
        self.bytes = Gauge("hierens_body_bytes", "bytes of request bodies in memory now", **kept)
        self.policy = Gauge("hierens_policy", "numbers of a replica's policy, by name", ["name", "replica"], **kept)

    def answered(self, answers: list[dict[str, Any]], seconds: float) -> None:
        """Record the predictions of a request."""
        self.seconds.observe(seconds)
        for answer in answers:
            self.answers.labels(answer["depth"]).inc()
            self.depth.set(answer["depth"] if answer["depth"] is not None else float("nan"))


async def unknown(request: Request, error: HTTPException) -> JSONResponse:
    """Unknown paths and methods, in the format of all errors."""
    return JSONResponse({"error": f"{error.detail}."}, error.status_code, error.headers)


class Gateway:
    """Checks and decodes requests, calls the replicas, records metrics."""

    def __init__(self, replicas: Replicas, settings: Settings) -> None:
        self.replicas, self.settings = replicas, settings
        self.metrics, self.decoders, self.answered = Metrics(), ThreadPoolExecutor(2), False
        self.queue = self.held = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/healthz", self.alive),
            Route("/readyz", self.ready),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: unknown})

    async def predict(self, request: Request) -> Response:
        """Classify the images in the form's fields `image`."""
        start, status = time.perf_counter(), 499  # 499: the client hung up
        try:
            answers = await self._predict(request)
            taken, status = time.perf_counter() - start, 200
            self.metrics.answered(answers, taken)
            return JSONResponse({"answers": answers, "milliseconds": round(1e3 * taken, 2)})
        except RefusedError as refusal:
            status = refusal.status
            return JSONResponse({"error": refusal.sentence}, status, refusal.headers)
        except ClientDisconnect:
            return Response(status_code=status)
        except Exception as error:
            status = 500
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return JSONResponse({"error": "The server failed on this request; its log says why."}, status)
        finally:
            self.metrics.requests.labels(status).inc()

    async def _predict(self, request: Request) -> list[dict[str, Any]]:
        room = announced_bytes(request, self.settings.max_bytes)
        if not self.replicas.alive:
            raise RefusedError(*NO_REPLICA)
        with self._admitted():
            with self._holding(room):
                limits = self.settings
                files = await read_upload(request, limits.max_bytes, limits.max_images, limits.upload_s)
                prepare = asyncio.get_running_loop().run_in_executor
                images = await prepare(self.decoders, self.replicas.inputs.prepare, files, limits.max_pixels)
                del files
            return await self._ask(images)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.queue >= self.settings.max_queue:
            raise RefusedError(503, "Too many requests are waiting; try again in a second.", AGAIN)
        self.queue += 1
        try:
            yield
        finally:
            self.queue -= 1

    @contextlib.contextmanager
    def _holding(self, room: int) -> Iterator[None]:
        if self.held + room > self.settings.buffer_bytes:
            raise RefusedError(503, "Too many uploads are under way; try again in a second.", AGAIN)
        self.held += room
        try:
            yield
        finally:
            self.held -= room

    async def _ask(self, images: np.ndarray) -> list[dict[str, Any]]:
        """Predictions of a replica; tries a second replica if the first one dies."""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                for again in range(2):
                    if not self.replicas.alive:
                        break
                    self.metrics.again.inc(again)
                    with contextlib.suppress(ReplicaError):
                        answers = await self.replicas.answer(images)
                        self.answered = True
                        return answers
        except TimeoutError:
            raise RefusedError(504, f"The model did not answer within {self.settings.timeout_s:g} seconds.") from None
        self.answered = False
        raise RefusedError(*NO_REPLICA)

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self.metrics.queue.set(self.queue)
        self.metrics.bytes.set(self.held)
        self.metrics.replicas.set(self.replicas.alive)
        for number, replica in self.replicas.running.items():
            for name, value in replica.metrics.items():
                self.metrics.policy.labels(name, number).set(value)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def alive(self, request: Request) -> JSONResponse:
        """Whether the gateway is running."""
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> JSONResponse:
        """Whether the model has made a prediction; tries one now if it has not, or if the last request failed."""
        try:
            if not self.replicas.alive:
                raise RefusedError(*NO_REPLICA)
            if not self.answered:
                async with asyncio.timeout(2):
                    await self._ask(np.zeros((1, *self.replicas.inputs.data["input_size"]), np.uint8))
        except (TimeoutError, RefusedError):
            return JSONResponse({"error": "The model has not answered yet."}, 503, AGAIN)
        return JSONResponse({"status": "ready"})
