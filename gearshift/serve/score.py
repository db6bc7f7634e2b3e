"""A reward model behind an address: `POST /score` as `rollouts.rewards.HttpReward` sends it.

The standard library's server: one model answers one request at a time, and no more is needed. What
a client sends wrongly is answered with a 4xx and one line of JSON; where some completions have no
score, with the others' scores too, and the places of these.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from gearshift.errors import ConfigError, GearshiftError
from gearshift.rollouts.rewards import RewardFunction, is_loopback
from gearshift.types import Message

MAX_BYTES = 64 << 20
PATIENCE = 30.0
"""Seconds that a client may be silent in the middle of a request."""
_LINGER = 1.0


class ScoreServer(ThreadingHTTPServer):
    """Answers `{"prompts", "completions"}` with `{"rewards"}`."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reward: RewardFunction, key: str | None) -> None:
        self.reward, self.key, self.one_at_a_time = reward, key, threading.Lock()
        super().__init__(address, _Handler)

    def handle_error(self, *_: Any) -> None:
        """One line; a client that has gone is worth none."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"gearshift: a request failed: {type(error).__name__}: {error}", file=sys.stderr)


def score_server(
    reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> ScoreServer:
    """The server; call its `serve_forever`. Port 0 takes a free one.

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

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ScoreServer
    raw_requestline: bytes
    timeout = PATIENCE
    default_request_version = "HTTP/1.0"  # or a line without a version would get no status

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

    def do_POST(self) -> None:
        try:
            self._allow()
            rewards = self._score(**_samples(self._body()))
        except _RefusedError as error:
            self._refuse(error.status, str(error))
        except TimeoutError:
            self._refuse(408, f"nothing came for {PATIENCE:g} seconds")
        else:
            lost = [i for i, r in enumerate(rewards) if r is not None and not math.isfinite(r)]
            if not lost:
                return self._answer(200, {"rewards": rewards})
            told = [None if i in lost else r for i, r in enumerate(rewards)]
            words = f"completions[{lost[0]}] is too long for the model, or its score is not finite"
            self._answer(422, {"error": words, "rewards": told, "lost": lost})

    def _score(
        self, prompts: list[list[Message]], completions: list[str], **ended: list[bool]
    ) -> list[float | None]:
        try:
            with self.server.one_at_a_time:
                rewards = self.server.reward(prompts, completions, **ended)
            return [None if r is None else float(r) for r in rewards]  # type: ignore[union-attr]
        except GearshiftError as error:  # a text too long for the model, say
            raise _RefusedError(400, str(error)) from error
        except Exception as error:  # a fault of ours, so that it may be asked again
            reason = f"the reward failed: {type(error).__name__}: {error}"
            raise _RefusedError(503, reason) from error

    def _allow(self) -> None:
        key = self.server.key
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode(errors="replace")):
            raise _RefusedError(401, "a wrong key, or none")
        if not _is_score(self.path):
            raise _RefusedError(404, "POST to /score")

    def _body(self) -> Any:
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _RefusedError(411, "a Content-Length must be given, and no Transfer-Encoding")
        length = lengths.pop().strip()
        if lengths or not re.fullmatch(r"[0-9]+", length):
            raise _RefusedError(400, "Content-Length must be one number, 0 or more")
        if len(length) > 18 or int(length) > MAX_BYTES:
            raise _RefusedError(413, f"more than {MAX_BYTES} bytes")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise _RefusedError(400, f"the body ends after {len(data)} of {length} bytes")
        try:
            return json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, f"the body is not JSON: {error}") from error

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: a method that is not there, a line that cannot be read."""
        if code == 501:
            known = _is_score(self.path)
            self._refuse(405 if known else 404, "POST to /score")
        else:
            self._refuse(code if code < 500 else 400, message or "a bad request")

    def _refuse(self, code: int, words: str) -> None:
        """Answer, then let the client finish: closing on what it still sends would lose the
        answer.
        """
        self._answer(code, {"error": words})
        until = time.monotonic() + _LINGER
        try:
            self.wfile.flush()
            self.connection.shutdown(1)
            self.connection.settimeout(_LINGER / 4)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass
        except OSError:
            pass

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code == 405:
            self.send_header("Allow", "POST")
        self.end_headers()
        self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def _is_score(path: str) -> bool:
    try:
        return urlsplit(path).path.rstrip("/") == "/score"
    except ValueError:
        return False


def _no_constant(word: str) -> None:
    raise ValueError(f"it has no {word}")


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
    if len(prompts) != len(completions):
        raise _RefusedError(400, f"{len(prompts)} prompts and {len(completions)} completions")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise _RefusedError(400, f'prompts[{i}] must be a list of {{"role", "content"}} texts')
        if not _is_text(completion):
            raise _RefusedError(400, f"completions[{i}] must be a text of Unicode")
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
