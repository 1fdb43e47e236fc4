"""HTTP before a request reaches its route: limits on headers, the bearer token, headers of responses, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import sys
from typing import Any

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.settings import Settings

MAX_HEADER_BYTES = 16_384
LARGE_HEADERS = f"The headers are larger than {MAX_HEADER_BYTES} bytes."
PROTECTED = ("/predict", "/metrics")  # by the bearer token
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """ASGI middleware: refuses large headers and wrong tokens, and adds security headers to all responses."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, send_secured)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return JSONResponse({"error": LARGE_HEADERS}, 431)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.expected and scope["path"] in PROTECTED and not hmac.compare_digest(given, self.expected):
            error = {"error": "The header Authorization must hold the bearer token of this server."}
            return JSONResponse(error, 401, {"WWW-Authenticate": "Bearer"})
        return None


class Protocol(H11Protocol):
    """uvicorn's protocol with a time limit on the header of a request, and errors in the format of all errors."""

    header_s = 10.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept a connection; its first request has to follow."""
        super().connection_made(transport)
        self._limit_header()

    def data_received(self, data: bytes) -> None:
        """Parse data. Without a request under way it is a header, or a body that nobody reads."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._limit_header()
        elif self._waiting:
            self._waiting = self._waiting.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self._waiting:
            self._waiting = self._waiting.cancel()

    def _limit_header(self) -> None:
        if not self._waiting:
            self._waiting = self.loop.call_later(self.header_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, or 431 for a header that is too large."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        text = LARGE_HEADERS if status == 431 else "This is no valid request."
        body = json.dumps({"error": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), *SECURITY_HEADERS]
        with contextlib.suppress(h11.LocalProtocolError):  # the response has begun
            events = h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which at its end also answers requests that have arrived but are not read yet."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, answer all requests, and close."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.5)
        await super().shutdown(sockets)


def http_server(app: ASGIApp, settings: Settings, token: str | None) -> Server:
    """The HTTP server of an application, and the bearer token that it requires."""
    return Server(
        uvicorn.Config(
            Guard(app, token),
            http=type("Protocol", (Protocol,), {"header_s": settings.upload_s}),
            loop="asyncio",
            lifespan="off",
            ws="none",
            interface="asgi3",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=int(settings.upload_s + settings.timeout_s) + 1,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
    )
