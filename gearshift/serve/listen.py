"""The socket and the connections: uvicorn with limits on time and number, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from typing import Any

import uvicorn
from h11 import IDLE, RemoteProtocolError
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gearshift.errors import ConfigError
from gearshift.rewards.http_client import is_loopback
from gearshift.runtime.interrupt import Interrupt
from gearshift.runtime.terminal import echo
from gearshift.serve.exchange import ExchangeMiddleware
from gearshift.serve.settings import ServerSettings, ServerState

_LARGEST_HEAD = 1 << 16


class Server:
    """An app at an address: `run` serves until a signal, `start` and `stop` serve in a thread.

    Raises `ConfigError` if other machines can reach the host and there is no key, and if nothing
    can listen on the host and port.
    """

    def __init__(self, app: Starlette) -> None:
        self.settings: ServerSettings = app.state.settings
        self.state: ServerState = app.state.server
        self._exchange: list[ExchangeMiddleware] = app.state.exchange
        self._socket = _bind(self.settings)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=_connection_class(self.settings),
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_LARGEST_HEAD,
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="gearshift server", daemon=True)

    @property
    def url(self) -> str:
        """The address that a client on this machine uses."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Serve in a thread."""
        self._thread.start()

    def stop(self, drain: float | None = None) -> bool:
        """Stop accepting; requests in work have `drain` seconds (None: those of the settings), then
        each ends with one error. Returns whether all have ended.
        """
        self.state.draining = True
        self._server.should_exit = True
        self._thread.join(self.settings.drain if drain is None else drain)
        if self._thread.is_alive() and self._loop is not None:
            for exchange in self._exchange:
                self._loop.call_soon_threadsafe(exchange.end_running)
            self._thread.join(1.0)
        self._socket.close()
        return not self._thread.is_alive()

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or another signal to end, then stop. Returns the signal's
        number.
        """
        with Interrupt() as interrupt, interrupt.between_steps():
            interrupt.rest = "requests in work got no answer"
            if not self._thread.is_alive():
                self.start()
            while not interrupt.requested and self._thread.is_alive():
                self._thread.join(0.1)
            answered = self.stop()
        if not answered:  # Python would abort while a thread still computes
            echo("gearshift: stopped before every request had an answer.", file=sys.stderr)
            os._exit(128 + interrupt.signal)
        return interrupt.signal

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())


def _bind(settings: ServerSettings) -> socket.socket:
    host, port = settings.host, settings.port
    if not settings.key and not is_loopback(host):
        raise ConfigError(
            f"Other machines can reach {host}; set GEARSHIFT_KEY, or serve on 127.0.0.1."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the socket names its protocol.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(settings.connections)  # so that clients wait in the queue, not before it
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(
            f"Nothing can listen on {host}:{port} ({error}); name another --host or --port."
        ) from error
    return bound


def _connection_class(settings: ServerSettings) -> Any:
    return type("Connection", (_Connection,), {"settings": settings})


class _Connection(H11Protocol):
    """One client. It has a fixed time to send the head of a request, and it may not leave a full
    buffer of its answer unread for longer than that.
    """

    settings: ServerSettings
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            self._refuse(503, "Service Unavailable", "too many clients; try again")
            return
        self._head = self.loop.call_later(self.settings.patience, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not IDLE:
            self._cancel("_head")
        elif self._head is None:
            self._head = self.loop.call_later(self.settings.patience, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_head")
        self._cancel("_unread")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.settings.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_unread")

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is no HTTP, in JSON as all other errors."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, RemoteProtocolError) else 400
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # its answer has perhaps begun
        elif hint == 431:
            self._refuse(431, "Request Header Fields Too Large", "the head is too large")
        else:
            self._refuse(400, "Bad Request", "the request is not valid HTTP")

    def _refuse(self, status: int, reason: str, words: str) -> None:
        found = {"message": words, "type": "invalid_request_error", "param": None, "code": "http"}
        body = json.dumps({"error": found})
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        head += "Retry-After: 2\r\n" if status == 503 else ""
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self._cancel("_head")
        self.transport.write((head + body).encode())
        self.transport.write_eof()
        # Data that comes before the end would reset the connection, and the answer would be lost.
        self.loop.call_later(0.25, self.transport.close)

    def _cancel(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
