"""A server of a reward model's scores: it answers the `POST /score` that `HttpReward` sends.

It is the standard library's server, because one model can answer only one request at a time. A
wrong request gets a 4xx status and one line of JSON. If some completions have no score, the answer
has the other scores and the places of the missing ones. A slow client delays no other client. This
file must not import trainers or the pipeline.
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

from gearshift.errors import ConfigError, GearshiftError
from gearshift.rewards.functions import RewardFunction
from gearshift.rewards.http_client import is_loopback
from gearshift.runtime.interrupt import Interrupt
from gearshift.runtime.terminal import echo, one_line
from gearshift.runtime.user_functions import describe_error
from gearshift.serve.score_request import RefusedError, is_local, parse_samples, path_and_host
from gearshift.types import Message

MAX_BYTES = 16 << 20
"""The largest body of a request, in bytes."""
CONNECTIONS = 256
"""The number of clients at the same time; a further client gets status 503."""
PATIENCE = 30.0
"""How many seconds a client has to send its request, how many it has to receive its answer, and how
many a request waits for the model."""
STOPPING = 20.0
"""How many seconds the server finishes the requests that it has read, after a signal."""
_LINGER = 1.0
_AGAIN = {"Retry-After": "2"}
_BUSY = "too many requests at the same time; send it again"


class ScoreServer(ThreadingHTTPServer):
    """Answers `{"prompts", "completions"}` with `{"rewards"}`."""

    daemon_threads = True
    request_queue_size = CONNECTIONS
    timeout = 0.2

    def __init__(self, address: tuple[str, int], reward: RewardFunction, key: str | None) -> None:
        self.reward, self.key, self.one_at_a_time = reward, key, threading.Lock()
        self.parsing = threading.Lock()
        """One body is parsed at a time, because JSON of many small parts takes twenty times its
        size in memory.
        """
        self._places = threading.Semaphore(CONNECTIONS)
        self._working, self._changed = 0, threading.Condition()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def run(self) -> int:
        """Answer until SIGTERM, SIGINT or another signal to end; then finish the requests that are
        read, for at most `STOPPING` seconds. Returns the signal's number.
        """
        with Interrupt() as interrupt, interrupt.between_steps():
            while not interrupt.requested:
                self.handle_request()
            self.server_close()
            with self._changed:
                answered = self._changed.wait_for(lambda: not self._working, STOPPING)
        if not answered:  # Python would abort while a thread still computes
            echo("gearshift: stopped before every request had an answer.", file=sys.stderr)
            os._exit(128 + interrupt.signal)
        return interrupt.signal

    def server_bind(self) -> None:
        """Bind as the base class does, but do not look up this machine's name in the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[Any, Any]:
        """Accept the next client."""
        try:
            return super().get_request()
        except OSError:  # no file descriptor is free: the client stays in the queue
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the client, or answer 503 if there are too many clients."""
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
            request.recv(1 << 16)  # with unread data, the answer would be lost
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one client from its first byte to its last."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def work(self, change: int) -> None:
        """Add to the number of requests that are read and not answered."""
        with self._changed:
            self._working += change
            self._changed.notify_all()

    def handle_error(self, *_: Any) -> None:
        """Print the error in one line, unless the client closed the connection."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)


def score_server(
    reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> ScoreServer:
    """The server; call its `run`. Port 0 takes a free port. Clients send the key as `Authorization:
    Bearer KEY`.

    Raises `ConfigError` if other machines can reach the host and there is no key, and if nothing
    can listen on the host and port.
    """
    if not key and not is_loopback(host):
        raise ConfigError(
            f"Other machines can reach {host}; set GEARSHIFT_KEY, or serve on 127.0.0.1."
        )
    try:
        return ScoreServer((host, port), reward, key)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Nothing can listen on {host}:{port} ({error}); name another --host or --port."
        ) from error


class _UntilThen(io.RawIOBase):
    """The bytes that a socket receives before a fixed time, however slowly they arrive."""

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
    default_request_version = "HTTP/1.0"  # a line without a version gets a status line too

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_UntilThen(self.connection, self.timeout))

    def finish(self) -> None:
        """Read what the client still sends before the connection is closed, for at most a second:
        unread data would reset the connection, and the answer would be lost.
        """
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
        return True  # `_body` answers 100 after the request is allowed

    def do_POST(self) -> None:
        try:
            self._allow()
            samples = self._samples()
            self.server.work(1)
            self._in_work = True
            rewards = self._score(**samples)
        except RefusedError as error:
            self._answer(error.status, {"error": str(error)}, error.headers)
        except TimeoutError:
            self._answer(408, {"error": f"the request is not complete after {self.timeout:g} s"})
        else:
            self._answer_rewards(rewards)

    def _answer_rewards(self, rewards: list[float | None]) -> None:
        lost = [i for i, r in enumerate(rewards) if r is not None and not math.isfinite(r)]
        if not lost:
            return self._answer(200, {"rewards": rewards})
        known = [None if i in lost else r for i, r in enumerate(rewards)]
        words = f"completions[{lost[0]}] is too long for the model, or its score is not finite"
        self._answer(422, {"error": words, "rewards": known, "lost": lost})

    def _score(
        self, prompts: list[list[Message]], completions: list[str], **ended: list[bool]
    ) -> list[float | None]:
        if not self.server.one_at_a_time.acquire(timeout=self.timeout):
            raise RefusedError(503, "the model is busy with other requests; send it again", _AGAIN)
        try:
            rewards = self.server.reward(prompts, completions, **ended)
            return [None if r is None else float(r) for r in rewards]  # type: ignore[union-attr]
        except GearshiftError as error:  # for example, the template refuses a conversation
            raise RefusedError(400, one_line(str(error))) from error
        except Exception as error:  # the client made no mistake, so it may send the request again
            echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)
            reason = f"the model failed ({type(error).__name__}); see the server's log"
            raise RefusedError(503, reason, _AGAIN) from error
        finally:
            self.server.one_at_a_time.release()

    def _allow(self) -> None:
        """Raise `RefusedError` for a client that may not ask, before its body is read."""
        key = self.server.key
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode(errors="replace")):
            raise RefusedError(401, "the key is wrong or missing", {"WWW-Authenticate": "Bearer"})
        if self.headers.defects:
            raise RefusedError(400, "a header line has no name and value")
        # A page in a browser can send to this machine under a name that the page's owner has in the
        # DNS. So a browser is refused, and so is a Host that is not this machine's.
        if "Origin" in self.headers:
            raise RefusedError(403, "pages in a browser are not answered")
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 and (hosts or self.request_version != "HTTP/1.0"):
            raise RefusedError(400, "one Host must be given")
        path, named = path_and_host(self.path)
        if not key and not all(map(is_local, [*hosts, *named])):
            raise RefusedError(403, "the Host is not this machine; write 127.0.0.1 or localhost")
        if path != "/score":
            raise RefusedError(404, "POST to /score")
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "the Content-Type must be application/json")

    def _body(self) -> bytes:
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "a Content-Length must be given, and no Transfer-Encoding")
        length = lengths.pop().strip()
        if lengths or not re.fullmatch(r"[0-9]+", length):
            raise RefusedError(400, "Content-Length must be one number, 0 or more")
        if len(length) > 18 or int(length) > MAX_BYTES:
            raise RefusedError(413, f"the body has more than {MAX_BYTES} bytes; send it in parts")
        expected = self.headers.get("Expect", "").strip().lower()
        if expected not in ("", "100-continue"):
            raise RefusedError(417, "Expect may only be 100-continue")
        if expected and self.request_version != "HTTP/1.0":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise RefusedError(400, f"the body ends after {len(data)} of {length} bytes")
        return data

    def _samples(self) -> dict[str, Any]:
        data = self._body()
        with self.server.parsing:
            return parse_samples(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that the base class refuses: an unknown method, or a wrong line."""
        if code == 501:
            known = path_and_host(self.path)[0] == "/score"
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
        """Do not log requests."""
