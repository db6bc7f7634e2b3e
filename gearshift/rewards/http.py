"""Asking an address on the web: JSON there and JSON back, within a time, a size and a few tries.

It knows no rewards: who asks says what the answer is read for.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message as Headers
from functools import partial
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener, getproxies

from gearshift.errors import ConfigError
from gearshift.runtime.urls import Endpoint, checked_variable, redact_urls
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import run_with_timeout

T = TypeVar("T")


def bearer_key(named: str | None, default: str) -> str | None:
    """The key in the environment variable `named`, or if none is named in `default`, where it may
    be missing. A key goes to the address for which it was named, and to no other.

    Raises `ConfigError` for a missing variable or one that no header can carry.
    """
    try:
        checked_variable(named or default)
    except ValueError as error:
        raise ConfigError(f"`key_env`: {error}") from None
    key = os.environ.get(named or default, "").strip()
    if named and not key:
        raise ConfigError(
            f"key_env names {named}, which is not set; export it, or set key_env=null."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The key in {named or default} holds more than plain characters.")
    return key or None


def http_host(source: str, url: str) -> str:
    """The host of an http address. Raises `ConfigError`, which names the source, for another."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number, brackets that do not close
        known = None
    if not known or not url.isascii() or re.search(r"\s", url):
        raise ConfigError(f"{redact_urls(source)} has no address; write http://HOST:PORT/PATH.")
    return str(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NoAnswerError(Exception):
    """An address has not answered, or not what it was asked for, however often it was asked."""


def post(
    address: Endpoint,
    body: dict[str, Any],
    read: Callable[[Any], T | None],
    timeout: float,
    tries: int,
    pause: float = 0.5,
) -> T:
    """What `read` finds in the JSON that a POST is answered with. Asked again, after a pause that
    doubles (or as long as the answer says, a minute at most), where nobody answers, the server is
    ill or busy, or `read` finds nothing. A try ends `timeout` seconds after it began, whatever the
    server has said by then, and no more than `_MOST` bytes are read.

    Raises `NoAnswerError` after the last try; `ConfigError` where the server refuses. Redirects are
    refused too: they would carry the key to somebody else.
    """
    headers = {"Content-Type": "application/json"}
    if address.key:
        headers["Authorization"] = f"Bearer {address.key}"
    request = Request(address.url, json.dumps(body, default=str).encode(), headers)
    why, wait = "", 0.0
    for attempt in range(tries):
        time.sleep(wait)
        wait = pause * 2**attempt
        try:
            status, reason, told_of, told = run_with_timeout(
                timeout, partial(_answer, request, timeout)
            )
        except TimeoutError:
            why = f"it has not answered in full after {timeout:g} s"
            continue
        except URLError as error:
            why = str(error.reason)
            continue
        except (OSError, HTTPException, ValueError) as error:
            why = describe_error(error)
            continue
        if status < 300 or status == _IN_PART:
            with suppress(*_UNREADABLE):
                if (found := read(json.loads(told))) is not None:
                    return found
        if 300 <= status < 500 and status not in _BUSY:  # it won't be otherwise the next time
            said = f"{reason} {told.decode('utf-8', 'replace')}"
            if place := told_of.get("Location"):
                said = f"It redirects to {place}; name that address. {said}"
            raise ConfigError(f"{address.display} refused: {status} {address.redact(said)}")
        said = repr(address.redact(told.decode("utf-8", "replace"), 60))
        why = f"what was asked for is not in its answer {said}"
        if status >= 300:
            why = f"it answers {status} {reason}"
            asked = told_of.get("Retry-After", "")
            wait = max(wait, min(60.0, float(asked))) if asked.isdecimal() else wait
    raise NoAnswerError(f"{address.display}: {address.redact(why)}, {tries} times")


def _answer(request: Request, timeout: float) -> tuple[int, str, Headers, bytes]:
    """Status, reason, headers and body of the answer."""
    # A proxy sees all that is sent by http, the key too; by https it sees nothing but the host.
    proxies = {scheme: by for scheme, by in getproxies().items() if scheme == "https"}
    opener = build_opener(_NoRedirect, ProxyHandler(proxies))
    try:
        answer = opener.open(request, timeout=timeout)
    except HTTPError as error:
        answer = error
    with answer:
        return answer.status, str(answer.reason), answer.headers, answer.read(_MAX_BYTES)


_BUSY = frozenset({408, 409, 425, 429})
_IN_PART = 422
"""Some of what was sent has no answer; `gearshift serve` says which."""
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)
"""What reading an answer that is not as agreed raises."""
_MAX_BYTES = 8 << 20
"""Bytes of an answer that are read: far more than the rewards of the largest group."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def short_repr(value: object) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, say
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
