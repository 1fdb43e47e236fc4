"""The server's settings, each a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """What the server takes."""

    model: str
    """directory of `save_pretrained`, or a repository on the Hub"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is all"""
    port: int = 8000
    """port to listen on"""
    policy: Literal["load", "fixed", "saved"] = "load"
    """give way under load; always `depth`; or what the model's policy.json says"""
    depth: int | None = None
    """of `fixed`, and the most of `load`; the whole tree by default"""
    target_ms: float = 250
    """99th percentile of latencies that `load` keeps below"""
    queue_high: int = 8
    """waiting requests of a replica from which on `load` gives way"""
    replicas: int = 1
    """processes that hold the model"""
    threads: int = 1
    """CPU threads of each"""
    max_batch: int = 16
    """requests answered together"""
    batch_wait_ms: float = 2
    """how long the first request of a batch waits for others"""
    max_images: int = 16
    """in a request"""
    max_queue: int = 128
    """requests in the service at once; more get 503. It bounds the queue, and so how late an answer can be"""
    max_bytes: int = 8_000_000
    """of a request's body"""
    max_pixels: int = 16_000_000
    """of an image, decoded"""
    buffer_bytes: int = 128_000_000
    """bodies held at once; more get 503"""
    upload_s: float = 10
    """a body that takes longer gets 408"""
    timeout_s: float = 30
    """an answer that takes longer is a 504"""
    top: int = 5
    """classes in an answer"""
