"""JSON requests over HTTP, with limits on time, size and the number of tries.

This file knows no rewards: the caller gives the function that reads an answer.
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
from gearshift.runtime.terminal import counted
from gearshift.runtime.urls import Endpoint, checked_variable, redact_urls
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import run_with_timeout

T = TypeVar("T")


def bearer_key(named: str | None, default: str) -> str | None:
    """The key in the environment variable `named`; if that is None, the key in `default`, which may
    be missing. A key is sent only to the address for which it was named.

    Raises `ConfigError` if the variable is missing, or a header cannot carry its value.
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
        raise ConfigError(
            f"The key in {named or default} contains characters that a header cannot carry."
        )
    return key or None


def http_host(source: str, url: str) -> str:
    """The host of an http address. Raises `ConfigError`, with the source's name, for any other
    text.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number, or brackets that do not close
        known = None
    if not known or not url.isascii() or re.search(r"\s", url):
        raise ConfigError(f"{redact_urls(source)} has no address; write http://HOST:PORT/PATH.")
    return str(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NoAnswerError(Exception):
    """In all tries, a server did not answer, or its answer lacked what the request asked for."""


def post(
    address: Endpoint,
    body: dict[str, Any],
    read: Callable[[Any], T | None],
    timeout: float,
    tries: int,
    pause: float = 0.5,
) -> T:
    """Send a POST and return what `read` finds in the JSON of the answer. The request is repeated
    if there is no answer, the server is broken or busy, or `read` finds nothing; the pause before
    it doubles each time (or is what the server asks for, at most a minute). A try ends `timeout`
    seconds after it began, and reads at most `_MAX_BYTES`.

    Raises `NoAnswerError` after the last try, and `ConfigError` if the server refuses the request.
    Redirects are refused too, because they would carry the key to another server.
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
            status, reason, answer_headers, content = run_with_timeout(
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
                if (found := read(json.loads(content or b"null"))) is not None:
                    return found
        # a repeated request would get the same answer
        if 300 <= status < 500 and status not in _BUSY:
            text = f"{reason} {content.decode('utf-8', 'replace')}"
            if place := answer_headers.get("Location"):
                text = f"It redirects to {place}; name that address. {text}"
            raise ConfigError(f"{address.display} refused: {status} {address.redact(text)}")
        shown = repr(address.redact(content.decode("utf-8", "replace"), 60))
        why = f"what was asked for is not in its answer {shown}"
        if status >= 300:
            why = f"it answers {status} {reason}"
            asked = answer_headers.get("Retry-After", "")
            wait = max(wait, min(60.0, float(asked))) if asked.isdecimal() else wait
    raise NoAnswerError(f"{address.display}: {address.redact(why)}, {counted(tries, 'time')}")


def _answer(request: Request, timeout: float) -> tuple[int, str, Headers, bytes]:
    """Status, reason, headers and body of the answer."""
    # An http proxy would see the key; an https proxy sees only the host.
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
"""The status of an answer that lacks some of the rewards; `gearshift serve` lists their places."""
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)
"""The errors that `read` raises for an answer of an unexpected form."""
_MAX_BYTES = 8 << 20
"""How many bytes of an answer are read, far more than the rewards of the largest group have."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def short_repr(value: object) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except Exception:  # for example an integer with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
