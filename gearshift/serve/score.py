"""A reward model behind an address: `POST /score` as `rollouts.rewards.HttpReward` sends it.

The standard library's server: one model answers one request at a time, and no more is needed.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gearshift.errors import ConfigError, GearshiftError
from gearshift.rollouts.rewards import RewardFunction

MAX_BYTES = 64 << 20


def score_server(
    reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> ThreadingHTTPServer:
    """A server that answers `{"prompts", "completions"}` with `{"rewards"}`; call its
    `serve_forever`. Port 0 takes a free one.

    Raises `ConfigError` for a host beyond loopback without a key, which callers must send as
    `Authorization: Bearer KEY`.
    """
    if not key and not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from elsewhere; set GEARSHIFT_KEY, or serve on 127.0.0.1."
        )
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if key and not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {key}".encode()
            ):
                return self.answer(401, {"error": "a wrong key, or none"})
            if self.path.rstrip("/") != "/score":
                return self.answer(404, {"error": "POST to /score"})
            length = int(self.headers.get("Content-Length") or 0)
            if length > MAX_BYTES:
                return self.answer(413, {"error": f"more than {MAX_BYTES} bytes"})
            try:
                body = json.loads(self.rfile.read(length))
                with one_at_a_time:
                    rewards = list(reward(body["prompts"], body["completions"]))  # type: ignore[arg-type]
            except (ValueError, KeyError, TypeError, GearshiftError) as error:
                return self.answer(400, {"error": f"{type(error).__name__}: {error}"})
            self.answer(200, {"rewards": rewards})

        def answer(self, code: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing of each request."""

    return ThreadingHTTPServer((host, port), Handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
