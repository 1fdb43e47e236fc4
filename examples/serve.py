"""A hierens model behind HTTP, on Ray Serve: holds a latency by giving way in depth while the load is high.

python examples/serve.py --model DIR_OR_HUB_ID                        # answers on http://127.0.0.1:8000
curl -F image=@shirt.png http://127.0.0.1:8000/predict                # or several: -F image=@a.png -F image=@b.png

One `Gateway` checks and decodes uploads, counts and measures; it hands small arrays to the replicas of `Network`, which
hold the model and answer in batches. There is one gateway, so what /metrics says is true of the whole service.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: whatever else the machine does would come first

import ray
import tyro
from ray import serve
from service.gateway import Gateway
from service.network import Inputs, Network, load
from service.settings import Settings


def build(settings: Settings) -> serve.Application:
    """The service, ready for `serve.run`.

    Raises:
        ValueError: settings that do not fit the model, or a model that cannot be loaded.
    """
    for name in ("replicas", "threads", "max_batch", "max_images", "max_queue", "max_bytes", "max_pixels", "top"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")
    if settings.buffer_bytes < settings.max_bytes:
        raise ValueError(f"buffer_bytes must be at least max_bytes, {settings.max_bytes}.")
    model, _ = load(settings)
    network = Network.options(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.threads},
        # The gateway alone holds back what is too much, and a replica's policy should see the whole queue.
        max_ongoing_requests=settings.max_queue,
        max_queued_requests=settings.max_queue,
        health_check_period_s=2,
        health_check_timeout_s=10,
    ).bind(settings)
    # Room for refusals, health checks and metrics beside a full queue; beyond that Ray's proxy itself answers 503.
    return Gateway.options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * settings.max_queue + 64,
        max_queued_requests=64,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
    ).bind(network, settings, Inputs.of(model))


def start(settings: Settings, **ray_options: Any) -> None:
    """Serve in the background, on a Ray of our own if none is there; returns when the model has loaded."""
    service = build(settings)
    if not ray.is_initialized():
        # Ray's processes import `service`, wherever this was started from.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        ray.init(
            **{
                "num_cpus": max(os.cpu_count() or 1, settings.replicas * settings.threads),
                "include_dashboard": False,
                "object_store_memory": 128_000_000,
                "runtime_env": {"env_vars": {"PYTHONPATH": path}},
                "_node_ip_address": "127.0.0.1",
                **ray_options,
            }
        )
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(
        http_options={"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 10}, logging_config=quiet
    )
    serve.run(service, name="hierens", route_prefix="/", logging_config=quiet)


def stop() -> None:
    """End the service and Ray."""
    serve.shutdown()
    ray.shutdown()


def main(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    try:
        start(settings)
        print(f"{Path(settings.model).name} answers on http://{settings.host}:{settings.port}/predict", flush=True)
        done.wait()
    finally:
        stop()


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
