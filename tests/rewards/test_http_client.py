"""A request has a time and a size, whatever the server does, and its key goes to no proxy."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from gearshift.errors import ConfigError
from gearshift.rewards import http_client
from gearshift.rewards.http_client import NoAnswerError, post
from gearshift.runtime.urls import Endpoint
from tests.rewards.test_composite import answering, serving

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def ask(url: str, timeout: float = 1.0, key: str | None = None) -> Any:
    return post(Endpoint.of(url, key), {}, lambda answer: answer["rewards"], timeout, 2, 0.0)


def drips(pieces: Callable[[], Iterator[bytes]]) -> Callable[[BaseHTTPRequestHandler], None]:
    def say(handler: BaseHTTPRequestHandler) -> None:
        for piece in pieces():
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.02)

    return say


@pytest.mark.parametrize(
    "pieces",
    [
        lambda: itertools.repeat(b"H"),
        lambda: itertools.chain([HEAD], itertools.repeat(b"X-Header: a\r\n")),
        lambda: itertools.chain([HEAD, b"X-Header: "], itertools.repeat(b"a")),
        lambda: itertools.chain([HEAD + b"Content-Length: 9999\r\n\r\n"], itertools.repeat(b" ")),
        lambda: itertools.chain([CHUNKED], itertools.repeat(b"1\r\na\r\n")),
        lambda: itertools.chain([CHUNKED], itertools.repeat(b"1")),
    ],
    ids=["status", "headers", "a header", "body", "chunks", "a chunk's size"],
)
def test_an_answer_that_drips_ends_with_its_time(pieces: Any) -> None:
    threads = threading.active_count()
    with serving(drips(pieces)) as url, pytest.raises(NoAnswerError, match=r"2 times"):
        ask(url, timeout=0.3)
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= threads


def test_an_answer_that_does_not_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_MAX_BYTES", 1 << 16)
    sent: list[int] = []

    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(CHUNKED)
        while True:
            handler.wfile.write(b"1000\r\n" + b"[" * 4096 + b"\r\n")
            sent.append(4096)

    with serving(say) as url, pytest.raises(NoAnswerError, match="is not in its answer"):
        ask(url, timeout=30)
    assert sum(sent) < 64 << 20


@pytest.mark.parametrize("code", [200, 500, 400])
def test_an_answer_that_is_cut_off_is_no_answer(code: int) -> None:
    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 %d Said\r\nContent-Length: 99\r\n\r\n{" % code)
        handler.wfile.flush()
        handler.connection.close()

    error = ConfigError if code == 400 else NoAnswerError
    with serving(say) as url, pytest.raises(error):
        ask(url)


def test_a_key_goes_to_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, b'{"rewards": [1]}') as url, answering(200, b'{"rewards": [2]}') as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        assert ask(url, key="secret") == [1]
