"""Settings of the server; each is a flag."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Settings of the server."""

    model: str
    """folder of a saved model, or user/name on the Hub"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for all"""
    port: int = 8000
    """port to listen on"""
    token_file: str | None = None
    """file with the bearer token that /predict and /metrics require"""
    policy: Literal["load", "fixed", "saved"] = "load"
    """reduce the depth under load; always use `depth`; or use the model's policy.json, whatever it chooses"""
    depth: int | None = None
    """depth of `fixed`, and maximum depth of `load`; full depth by default"""
    target_ms: float = 250
    """target of `load` for the 99th percentile of latencies"""
    queue_high: int = 8
    """number of waiting requests of a replica at which `load` reduces the depth"""
    replicas: int = 1
    """processes that hold the model"""
    threads: int = 1
    """CPU threads of each"""
    max_batch: int = 16
    """maximum requests per batch"""
    batch_wait_ms: float = 2
    """how long the first request of a batch waits for others"""
    max_images: int = 16
    """maximum images per request"""
    max_queue: int = 128
    """maximum requests in the service; further ones get 503. Limits the latency"""
    max_bytes: int = 8_000_000
    """maximum size of a request body"""
    max_pixels: int = 16_000_000
    """maximum pixels per image"""
    buffer_bytes: int = 128_000_000
    """maximum bytes of bodies in memory; further requests get 503"""
    upload_s: float = 10
    """time limit of a request's header, then the connection is closed, and of an upload, then 408"""
    timeout_s: float = 30
    """time limit of a prediction; then 504"""
    top: int = 5
    """classes per prediction"""

    def check(self) -> None:
        """Check what needs no model.

        Raises:
            ValueError: a value is out of range.
        """
        for name in ("replicas", "threads", "max_batch", "max_images", "max_queue", "max_bytes", "max_pixels", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.buffer_bytes < self.max_bytes:
            raise ValueError(f"buffer_bytes must be at least max_bytes, {self.max_bytes}.")

    def token(self) -> str | None:
        """The bearer token.

        Raises:
            ValueError: the file cannot be read, or holds less than 16 characters.
        """
        if self.token_file is None:
            return None
        try:
            token = Path(self.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"token_file {self.token_file} cannot be read: {error}.") from error
        if len(token) < 16 or not token.isascii():
            raise ValueError(f"token_file {self.token_file} must hold at least 16 ASCII characters, got {len(token)}.")
        return token

    def listen(self) -> socket.socket:
        """A socket on the host and port.

        Raises:
            ValueError: the address is unknown or in use.
        """
        try:
            return socket.create_server((self.host, self.port), family=socket.getaddrinfo(self.host, None)[0][0])
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (")[0]
            raise ValueError(f"cannot listen on {self.host}, port {self.port}: {reason}.") from error
