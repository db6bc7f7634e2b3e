"""Server-sent events: a response whose parts appear while they are made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends each text that the generator gives, as `data: {...}\\n\\n`. Where it gives nothing for
    `every` seconds, `alive` is sent, so that no proxy and no client takes the stream for dead.

    The generator is closed at its end, and when the client leaves. An error that it raises becomes
    the last event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], alive: str = ": alive\n\n", every: float = 10.0
    ) -> None:
        self._events, self._alive, self._every = events, alive, every
        self.status_code, self.background = 200, None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last, self._send = time.monotonic(), send
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events) as events:
            keeper = asyncio.ensure_future(self._keep_alive())
            try:
                async for event in events:
                    await self._put(event)
            finally:
                keeper.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _put(self, event: str) -> None:
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})

    async def _keep_alive(self) -> None:
        while True:
            left = self._last + self._every - time.monotonic()
            if left <= 0:
                await self._put(self._alive)
            await asyncio.sleep(max(left, 0.01))
