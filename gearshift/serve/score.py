"""A reward model behind an address: `POST /score` as `HttpReward` sends it.

The standard library's server: one model answers one request at a time, and no more is needed. What
a client sends wrongly is answered with a 4xx and one line of JSON; where some completions have no
score, with the others' scores too, and the places of these. No client holds up another.
"""

from __future__ import annotations

import hmac
import io
import json
import math
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from gearshift.errors import ConfigError, GearshiftError
from gearshift.rewards.functions import RewardFunction
from gearshift.rewards.http import MAX_ROWS
from gearshift.rewards.http_client import is_loopback
from gearshift.runtime.interrupt import Interrupt
from gearshift.runtime.terminal import echo, one_line
from gearshift.runtime.user_functions import describe_error
from gearshift.types import Message

MAX_BYTES = 16 << 20
"""Longest body of a request."""
MAX_MESSAGES = 1 << 14
"""Messages of all its prompts together."""
CONNECTIONS = 256
"""Clients at a time; the next one is told to come again."""
PATIENCE = 30.0
"""Seconds in which a client must have sent its whole request, in which it must have taken its whole
answer, and that a request waits for the model."""
STOPPING = 20.0
"""Seconds for the requests in work once a signal has come."""
_LINGER = 1.0
_AGAIN = {"Retry-After": "2"}
_BUSY = "too many requests at a time; send it again"


class ScoreServer(ThreadingHTTPServer):
    """Answers `{"prompts", "completions"}` with `{"rewards"}`."""

    daemon_threads = True
    request_queue_size = CONNECTIONS
    timeout = 0.2

    def __init__(self, address: tuple[str, int], reward: RewardFunction, key: str | None) -> None:
        self.reward, self.key, self.one_at_a_time = reward, key, threading.Lock()
        self.parsing = threading.Lock()
        """JSON of many small parts takes twenty times its size."""
        self._places = threading.Semaphore(CONNECTIONS)
        self._working, self._changed = 0, threading.Condition()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def run(self) -> int:
        """Answer until SIGTERM, SIGINT or another end comes; then finish the requests in work, for
        a while. Returns the signal.
        """
        with Interrupt() as interrupt, interrupt.between_steps():
            while not interrupt.requested:
                self.handle_request()
            self.server_close()
            with self._changed:
                answered = self._changed.wait_for(lambda: not self._working, STOPPING)
        if not answered:  # Python's own end would abort in a thread that computes
            echo("gearshift: stopped; a request had no answer yet.", file=sys.stderr)
            os._exit(128 + interrupt.signal)
        return interrupt.signal

    def server_bind(self) -> None:
        """As the base class does, but without asking the network for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[Any, Any]:
        """The next client."""
        try:
            return super().get_request()
        except OSError:  # no descriptor is left: the client stays in the queue
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the client a thread, or the answer that there is none."""
        if self._places.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread can be started
                self._places.release()
                raise
            return
        body = json.dumps({"error": _BUSY})
        head = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 2\r\n"
        request.setblocking(False)
        try:
            request.send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            request.recv(1 << 16)  # what is not read would take back the answer
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One client's whole stay."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def work(self, change: int) -> None:
        """Count the requests that are read and not answered."""
        with self._changed:
            self._working += change
            self._changed.notify_all()

    def handle_error(self, *_: Any) -> None:
        """One line; a client that has gone is worth none."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)


def score_server(
    reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> ScoreServer:
    """The server; call its `run`. Port 0 takes a free one.

    Raises `ConfigError` for a host beyond loopback without a key, which callers must send as
    `Authorization: Bearer KEY`, and for a place where it cannot listen.
    """
    if not key and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from elsewhere; set GEARSHIFT_KEY, or serve on 127.0.0.1."
        )
    try:
        return ScoreServer((host, port), reward, key)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Nothing can listen on {host}:{port} ({error}); name another --host or --port."
        ) from error


class _RefusedError(Exception):
    """A request that is answered with this status and these words."""

    def __init__(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(words)
        self.status, self.headers = status, headers or {}


class _UntilThen(io.RawIOBase):
    """What a socket receives until a moment: a byte a second does not put it off."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: ScoreServer
    raw_requestline: bytes
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"
    _in_work = False
    default_request_version = "HTTP/1.0"  # or a line without a version would get no status

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_UntilThen(self.connection, self.timeout))

    def finish(self) -> None:
        """Let the client finish: closing on what it still sends would take back the answer."""
        super().finish()
        if self._in_work:
            self.server.work(-1)
        until = time.monotonic() + _LINGER
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER / 4)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass
        except OSError:
            pass

    def version_string(self) -> str:
        return "gearshift"

    def parse_request(self) -> bool:
        if not self.raw_requestline.strip():
            self.command, self.requestline, self.request_version = "", "", "HTTP/1.0"
            self.send_error(400, "an empty request line")
            return False
        if not super().parse_request():
            return False
        if self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"
        return True

    def handle_expect_100(self) -> bool:
        return True  # `_body` says so, once it is known that the body is wanted

    def do_POST(self) -> None:
        try:
            self._allow()
            samples = self._samples()
            self.server.work(1)
            self._in_work = True
            rewards = self._score(**samples)
        except _RefusedError as error:
            self._answer(error.status, {"error": str(error)}, error.headers)
        except TimeoutError:
            self._answer(408, {"error": f"the request is not whole after {self.timeout:g} seconds"})
        else:
            self._tell(rewards)

    def _tell(self, rewards: list[float | None]) -> None:
        lost = [i for i, r in enumerate(rewards) if r is not None and not math.isfinite(r)]
        if not lost:
            return self._answer(200, {"rewards": rewards})
        told = [None if i in lost else r for i, r in enumerate(rewards)]
        words = f"completions[{lost[0]}] is too long for the model, or its score is not finite"
        self._answer(422, {"error": words, "rewards": told, "lost": lost})

    def _score(
        self, prompts: list[list[Message]], completions: list[str], **ended: list[bool]
    ) -> list[float | None]:
        if not self.server.one_at_a_time.acquire(timeout=self.timeout):
            raise _RefusedError(503, "the model is busy with others; send it again", _AGAIN)
        try:
            rewards = self.server.reward(prompts, completions, **ended)
            return [None if r is None else float(r) for r in rewards]  # type: ignore[union-attr]
        except GearshiftError as error:  # a conversation that the template refuses, say
            raise _RefusedError(400, one_line(str(error))) from error
        except Exception as error:  # a fault of ours, so that it may be asked again
            echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)
            reason = f"the model failed ({type(error).__name__}); the server's log says more"
            raise _RefusedError(503, reason, _AGAIN) from error
        finally:
            self.server.one_at_a_time.release()

    def _allow(self) -> None:
        """Whether this client may ask at all; nothing of the body is read before."""
        key = self.server.key
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode(errors="replace")):
            raise _RefusedError(401, "a wrong key, or none", {"WWW-Authenticate": "Bearer"})
        if self.headers.defects:
            raise _RefusedError(400, "a header line that is none")
        # A page in a browser may send to any address, under any name that it has the DNS give it.
        if "Origin" in self.headers:
            raise _RefusedError(403, "pages in a browser are not answered")
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 and (hosts or self.request_version != "HTTP/1.0"):
            raise _RefusedError(400, "one Host must be given")
        path, named = _path_and_host(self.path)
        if not key and not all(map(_is_local, [*hosts, *named])):
            raise _RefusedError(403, "the Host is not this machine; write 127.0.0.1 or localhost")
        if path != "/score":
            raise _RefusedError(404, "POST to /score")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "the Content-Type must be application/json")

    def _body(self) -> bytes:
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _RefusedError(411, "a Content-Length must be given, and no Transfer-Encoding")
        length = lengths.pop().strip()
        if lengths or not re.fullmatch(r"[0-9]+", length):
            raise _RefusedError(400, "Content-Length must be one number, 0 or more")
        if len(length) > 18 or int(length) > MAX_BYTES:
            raise _RefusedError(413, f"more than {MAX_BYTES} bytes")
        expected = self.headers.get("Expect", "").strip().lower()
        if expected not in ("", "100-continue"):
            raise _RefusedError(417, "Expect may be 100-continue")
        if expected and self.request_version != "HTTP/1.0":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise _RefusedError(400, f"the body ends after {len(data)} of {length} bytes")
        return data

    def _samples(self) -> dict[str, Any]:
        data = self._body()
        with self.server.parsing:
            try:
                body = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
            except (ValueError, RecursionError) as error:
                raise _RefusedError(400, f"the body is not JSON: {one_line(str(error))}") from error
            return _samples(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: a method that is not there, a line that cannot be read."""
        if code == 501:
            known = _path_and_host(self.path)[0] == "/score"
            code, message = 405 if known else 404, "POST to /score"
        words = one_line(message or "a bad request", 100)
        self._answer(code if code < 500 else 400, {"error": words})

    def _answer(
        self, code: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        self.connection.settimeout(self.timeout)
        self.send_response(code)
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        allow = {"Allow": "POST"} if code == 405 else {}
        for name, text in {**own, **allow, **(headers or {}), "Connection": "close"}.items():
            self.send_header(name, text)
        self.end_headers()
        self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def _path_and_host(target: str) -> tuple[str, list[str]]:
    """The path of a request's line, and the host where the line names one."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return "", []
    return parts.path.rstrip("/"), [parts.netloc] if parts.netloc else []


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine, as no name of a stranger does."""
    name = re.sub(r":[0-9]*$", "", host.strip().lower())
    return is_loopback(name.removeprefix("[").removesuffix("]"))


def _no_constant(word: str) -> None:
    raise ValueError(f"it has no {word}")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _samples(body: Any) -> dict[str, Any]:
    """The prompts and completions of a request, each looked at; and `ended`, where some were cut
    before their end.
    """
    if not isinstance(body, dict):
        raise _RefusedError(400, 'the body must be {"prompts": [...], "completions": [...]}')
    prompts, completions = body.get("prompts"), body.get("completions")
    for name, value in (("prompts", prompts), ("completions", completions)):
        if not isinstance(value, list) or not value:
            raise _RefusedError(400, f"{name} must be a list, and not empty")
    assert isinstance(prompts, list) and isinstance(completions, list)
    if len(completions) > MAX_ROWS:
        raise _RefusedError(413, f"more than {MAX_ROWS} completions; send them in parts")
    if len(prompts) != len(completions):
        raise _RefusedError(400, f"{len(prompts)} prompts and {len(completions)} completions")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise _RefusedError(400, f'prompts[{i}] must be a list of {{"role", "content"}} texts')
        if not _is_text(completion):
            raise _RefusedError(400, f"completions[{i}] must be a text of Unicode")
    if sum(map(len, prompts)) > MAX_MESSAGES:
        raise _RefusedError(413, f"more than {MAX_MESSAGES} messages; send them in parts")
    samples = {"prompts": prompts, "completions": completions}
    ended = body.get("ended", [True] * len(prompts))
    if not isinstance(ended, list) or [*map(type, ended)] != [bool] * len(prompts):
        raise _RefusedError(400, "ended must be a list of true and false, one a completion")
    return samples if all(ended) else {**samples, "ended": ended}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and _is_text(message.get("role"))
        and _is_text(message.get("content"))
        and all(map(_is_text, message))
    )


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can write: without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
