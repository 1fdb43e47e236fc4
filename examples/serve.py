"""Serves a model over HTTP with Ray Serve; reduces the depth under load to hold a latency target.

pip install -e ".[serve]"                                             # what it needs
python examples/serve.py --model DIR_OR_HUB_ID                        # serves http://127.0.0.1:8000
curl -F image=@shirt.png http://127.0.0.1:8000/predict                # or several: -F image=@a.png -F image=@b.png

One `Gateway` checks and decodes uploads and records metrics. It passes small arrays to the replicas of `Network`, which
hold the model and predict in batches. There is only one gateway, so /metrics covers the whole service.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # the default is 15, which would give other programs priority
# After 3 times the default of 5 s, Ray ends a proxy that is still starting, as it may be on a busy machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")

from hierens.core.install import install_command

try:
    import ray
    import tyro
    from ray import serve
    from service.gateway import Gateway
    from service.network import Inputs, Network, load
    from service.settings import Settings
except ModuleNotFoundError as error:
    sys.exit(f"error: the server needs {error.name}: {install_command('serve')}.")


def build(settings: Settings) -> serve.Application:
    """The service, ready for `serve.run`.

    Raises:
        ValueError: settings do not fit the model, or the model cannot be loaded.
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
        # Only the gateway limits the queue, so that a replica's policy sees all of it.
        max_ongoing_requests=settings.max_queue,
        max_queued_requests=settings.max_queue,
        health_check_period_s=2,
        health_check_timeout_s=10,
    ).bind(settings)
    # Room for refusals, health checks and metrics beside a full queue; beyond that, Ray's proxy responds with 503.
    return Gateway.options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * settings.max_queue + 64,
        max_queued_requests=64,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
    ).bind(network, settings, Inputs.of(model))


def start(settings: Settings, **ray_options: Any) -> None:
    """Serve in the background, and start Ray if it is not running. Returns when the model is loaded."""
    service = build(settings)
    if not ray.is_initialized():
        # Ray's processes must find `service`, whatever the working directory.
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
    """Stop the service and Ray."""
    serve.shutdown()
    ray.shutdown()


def main(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    try:
        start(settings)
        print(f"{Path(settings.model).name} is served on http://{settings.host}:{settings.port}/predict", flush=True)
        done.wait()
    finally:
        stop()


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
