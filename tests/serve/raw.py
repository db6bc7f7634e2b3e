"""A server in a thread, and requests to it as bytes."""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.routing import BaseRoute

from gearshift.serve.app import Server, ServerSettings, make_app
from gearshift.serve.exchange import Observer


@contextmanager
def serving(
    routes: Sequence[BaseRoute], observe: Observer | None = None, **settings: Any
) -> Iterator[Server]:
    """The server of these routes at a free port."""
    given = ServerSettings(**{"port": 0, "drain": 5.0, **settings})
    server = Server(make_app(routes, given, observe))
    server.start()
    try:
        yield server
    finally:
        assert server.stop()


def send(server: Server, data: bytes, end: bool = False) -> tuple[int, bytes, bytes]:
    """(status, headers, body) of the answer to these bytes; `end`: say that no more will come."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(data)
        if end:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def request(body: bytes, *headers: str, line: str = "POST /score HTTP/1.1") -> bytes:
    """A request with the headers that are needed, unless they are given or, as `name:`, left out;
    `none:` leaves out the length.
    """
    named = {h.split(":")[0].lower() for h in headers}
    own = [] if named & {"content-length", "none"} else [f"Content-Length: {len(body)}"]
    own += [] if "host" in named else ["Host: localhost"]
    own += [] if "connection" in named else ["Connection: close"]
    own += [] if "content-type" in named else ["Content-Type: application/json"]
    lines = [line, *own, *(h for h in headers if h not in ("none:", "host:", "content-type:"))]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def error_of(body: bytes) -> dict[str, Any]:
    """The error in OpenAI's form."""
    return dict(json.loads(body)["error"])
