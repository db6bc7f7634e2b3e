"""One request from its first byte to the last byte of its answer: its id, its body, its errors, its
client that leaves.

The body is read here, with its bounds, before a route runs; so a route never waits for a slow
client. No route and no model is known here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gearshift.runtime.terminal import echo, one_line
from gearshift.runtime.user_functions import describe_error
from gearshift.serve.api_error import ApiError
from gearshift.serve.guard import check_access, cors_headers
from gearshift.serve.settings import ServerSettings, ServerState

log = logging.getLogger("gearshift.serve")
Observer = Callable[[Scope, int, float], None]
"""It gets each answered request, the status, and the seconds."""

LARGE = {"/score": 16 << 20}
"""Paths whose bodies may be larger than `max_body`, and their limits in bytes."""
LEFT = 499
"""The status that the log and the metrics have where the client left before its answer."""
_LINGER = 1.0
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {429: "rate_limit_error"}


class ExchangeMiddleware:
    """Runs each request inside the guard, and turns what it raises into an answer."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, state: ServerState, observe: Observer
    ) -> None:
        self.app, self.settings, self.state, self.observe = app, settings, state, observe
        self._running: set[asyncio.Task[None]] = set()
        self._out_of_time = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began = time.monotonic()
        answer = Answer(scope, send)
        try:
            await self._answer(scope, receive, answer)
        finally:
            seconds = time.monotonic() - began
            words = one_line(f"{answer.id} {scope['method']} {scope['path']}", 300)
            log.info("%s %d %.3f s", words, answer.status, seconds)
            self.observe(scope, answer.status, seconds)

    def end_running(self) -> None:
        """End all requests, because the time after the signal is over. Each gets one error."""
        self._out_of_time = True
        for task in self._running:
            task.cancel()

    async def _answer(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        body = _Body(receive, self.settings)
        try:
            _take_host_from_target(scope)
            answer.headers |= (cors := cors_headers(scope, self.settings))
            check_access(scope, self.settings)
            if cors and scope["method"] == "OPTIONS":
                return await answer.allow()
            _check_path(scope["path"])
            self._check_ready(scope["path"])
            await body.read(scope)
        except ConnectionError:
            answer.status = LEFT
        except ApiError as error:
            await answer.refuse(error, body)
        else:
            await self._run(scope, body, answer)

    async def _run(self, scope: Scope, body: _Body, answer: Answer) -> None:
        """Run the route while the connection is watched; a client that leaves ends the work."""
        work = asyncio.ensure_future(self.app(scope, body.replay, answer.send))
        watch = asyncio.ensure_future(body.gone())
        self._running.add(work)
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            left = not work.done()
            if left:
                work.cancel()
            await work
        except asyncio.CancelledError:
            work.cancel()
            if self._out_of_time:
                await answer.fail(ApiError(503, "not_ready", "the server is stopping"))
            elif answer.status == 0 or not answer.complete:
                answer.status = LEFT
            if (task := asyncio.current_task()) and task.cancelling():
                raise
        except Exception as error:
            await answer.fail(as_api_error(error))
        finally:
            self._running.discard(work)
            watch.cancel()

    def _check_ready(self, path: str) -> None:
        if path == "/health" or not (self.state.loading or self.state.draining):
            return
        words = "the server is stopping" if self.state.draining else "the model is still loading"
        again = {"Retry-After": "5", "x-should-retry": "true"}
        raise ApiError(503, "not_ready", words, headers=again)


class Answer:
    """What is sent to one client."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = f"req_{uuid4().hex[:24]}"
        scope.setdefault("state", {})["request_id"] = self.id
        self.headers = {"x-request-id": self.id, "request-id": self.id}
        self.headers["X-Content-Type-Options"] = "nosniff"
        self.status, self.complete = 0, False
        self._scope, self._send, self._streams = scope, send, False

    async def send(self, message: Message) -> None:
        """Send a part of the answer; the first part gets the headers of every answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self.headers)
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body"):
            self.complete = True
        await self._send(message)
        await asyncio.sleep(0)  # a client that left may be noticed, and others have their turn

    async def allow(self) -> None:
        """Answer a browser that asks whether a page of another site may call."""
        await self.send({"type": "http.response.start", "status": 204, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """Answer with an error. A stream of events that has begun ends with one more event."""
        if self.complete:
            return
        if not self.status:
            await self._whole(error)
        elif self._streams:
            event = f"data: {json.dumps(error_body(error, self._scope['path']))}\n\n"
            await self.send({"type": "http.response.body", "body": event.encode()})

    async def refuse(self, error: ApiError, body: _Body) -> None:
        """Answer before the body is read. What the client still sends is read for a moment, because
        unread data would reset the connection, and the answer would be lost.
        """
        headers = Headers(scope=self._scope)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self._whole(error)
        self.headers["Connection"] = "close"
        await self._whole(error, more=True)
        if "expect" not in headers:
            await body.discard(_LINGER)
        await self.send({"type": "http.response.body", "body": b""})

    async def _whole(self, error: ApiError, more: bool = False) -> None:
        data = json.dumps(error_body(error, self._scope["path"])).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        pairs = [(k.lower().encode(), v.encode()) for k, v in {**own, **error.headers}.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": pairs}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": data, "more_body": more})


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON of an error: OpenAI's form, and for `/score` one line."""
    words = one_line(str(error))
    if path == "/score":
        return {"error": words}
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "")
    found = {"message": words, "type": kind or "server_error", "param": error.param}
    return {"error": {**found, "code": error.code}}


def as_api_error(error: Exception) -> ApiError:
    """The error that the client gets. One that no code foresaw is printed here, and the client
    learns only that it happened.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        words = {404: "there is no such path", 405: "this path does not take this method"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
        text = words.get(error.status_code, error.detail)
        return ApiError(error.status_code, code, text, headers=error.headers)
    echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)
    return ApiError(500, "server_error", "the server failed; its log has the reason")


class _Body:
    """A request's body, and then the end of its connection."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._data, self._given, self._gone = b"", False, asyncio.Event()

    async def read(self, scope: Scope) -> None:
        """Read the whole body. Raises `ApiError` if it is too large or too slow, and
        `ConnectionError` if the client left.
        """
        most = max(self._settings.max_body, LARGE.get(scope["path"], 0))
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal():
            raise ApiError(400, "invalid_value", "Content-Length must be one number, 0 or more")
        too_large = ApiError(413, "request_too_large", f"the body has more than {most} bytes")
        if len(length) > 18 or int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.patience):
                while (message := await self._receive())["type"] == "http.request":
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        self._data = b"".join(parts)
                        return
        except TimeoutError:
            words = f"the request is not complete after {self._settings.patience:g} s"
            raise ApiError(408, "request_timeout", words) from None
        raise ConnectionError

    async def discard(self, seconds: float) -> None:
        """Read and drop what the client still sends: until it pauses, and for at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    async with asyncio.timeout(seconds / 4):
                        more = (await self._receive()).get("more_body", False)

    async def replay(self) -> Message:
        """Give the body to the route; after that, wait until the client leaves."""
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self._data, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def gone(self) -> None:
        """Wait until the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()


def _take_host_from_target(scope: Scope) -> None:
    """A request line may hold a whole URL: its host counts like the Host header's."""
    if scope["path"].startswith("/"):
        path = scope["path"]
    else:
        parts = urlsplit(scope["path"])
        scope["named_host"], path = parts.netloc, parts.path
    scope["path"] = path.rstrip("/") or "/"


def _check_path(path: str) -> None:
    if "\0" in path or "\\" in path or ".." in path.split("/"):
        raise ApiError(404, "not_found", "there is no such path")
