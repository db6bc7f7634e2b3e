"""Decides who may ask: the Host, the Origin, the key, the cookie of the pages, and the headers that
a call which changes something must have.

It reads headers only; no body, no model and no route.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from gearshift.rewards.http_client import is_loopback
from gearshift.serve.api_error import ApiError
from gearshift.serve.settings import ServerSettings

OPEN = re.compile(r"/|/health|/favicon\.ico|/web/.*|/labels|/runs(/[^/]*)?")
"""The paths that need no key: they hold no data. The pages among them ask for the key themselves.
"""
EXCHANGE = "/api/key"
"""The path where a page gives the key once, in the body of a POST, and gets a cookie for it."""
_LABELLING = re.compile(r"/api/served|/api/labels/(next|events|exchange|leave|setup|progress)")
"""The paths that a person's own key opens."""
READS = ("GET", "HEAD", "OPTIONS")
_ONCE = (
    "host",
    "authorization",
    "x-api-key",
    "content-length",
    "content-type",
    "content-encoding",
    "origin",
    "transfer-encoding",
    "expect",
)
_MOST_HEADERS, _LARGEST = 100, 1 << 15


def check_access(scope: Scope, settings: ServerSettings) -> None:
    """Raise `ApiError` unless this request may be answered. A right key in a header may come with
    any Host, because a page that another site shows under a name of its own cannot know the key.
    """
    headers = Headers(scope=scope)
    _check_form(scope, headers)
    has_key = _has_key(headers, settings.key)
    path, person = scope["path"], None
    if not has_key and _LABELLING.fullmatch(path):
        person = _person(scope, headers, settings)
        scope["person"] = person
    if not (settings.key and has_key):
        _check_host(scope, headers, settings)
    _check_origin(scope, headers, settings)
    if scope["method"] == "OPTIONS" and headers.get("origin") in settings.allow_origin:
        return
    by_cookie = not has_key and not person and _has_cookie(scope, headers, settings.key)
    if not (has_key or by_cookie or person or path == EXCHANGE or OPEN.fullmatch(path)):
        words = "the key is wrong or missing; send it as `Authorization: Bearer KEY`"
        raise ApiError(401, "invalid_api_key", words, headers={"WWW-Authenticate": "Bearer"})
    if scope["method"] not in READS and (by_cookie or path.startswith("/api/")):
        _check_page_call(headers)


def page_cookie(scope: Scope, key: str) -> str:
    """The Set-Cookie header for a page that knows the key. The cookie is the same after a restart,
    and the key cannot be computed from it.
    """
    return f"{_cookie_name(scope)}={_cookie_value(key)}; Path=/; HttpOnly; SameSite=Strict"


def person_key(key: str, name: str) -> str:
    """The key of a person who labels; the server's key cannot be computed from it."""
    return hmac.new(key.encode(), f"a person: {name}".encode(), hashlib.sha256).hexdigest()[:32]


def key_given(given: str, settings: ServerSettings) -> str | None:
    """The key that a page gives, if it is the server's or a person's; else None."""
    keys = [settings.key, *_person_keys(settings).values()]
    return next((key for key in keys if key and same_key(given, key)), None)


def same_key(given: str, key: str) -> bool:
    """Whether the two are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), key.encode(errors="replace"))


def cors_headers(scope: Scope, settings: ServerSettings) -> dict[str, str]:
    """The headers that let a page of an allowed origin read the answer."""
    origin = Headers(scope=scope).get("origin")
    if origin not in settings.allow_origin or not origin:
        return {}
    found = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "x-request-id, retry-after",
        "Vary": "Origin",
    }
    if scope["method"] == "OPTIONS":
        found["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE"
        names = "Authorization, Content-Type, X-Api-Key, X-Gearshift, Anthropic-Version"
        found["Access-Control-Allow-Headers"] = names
        found["Access-Control-Max-Age"] = "600"
    return found


def _check_form(scope: Scope, headers: Headers) -> None:
    size = len(scope["path"]) + sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > _MOST_HEADERS or size > _LARGEST:
        words = f"there are more than {_MOST_HEADERS} headers, or {_LARGEST} bytes in the head"
        raise ApiError(431, "headers_too_large", words)
    if scope.get("http_version") not in ("1.0", "1.1"):
        raise ApiError(400, "invalid_value", "the version of HTTP must be 1.1")
    for name in _ONCE:
        if len(headers.getlist(name)) > 1:
            raise ApiError(400, "invalid_value", f"the header {name} is given twice")
    if "content-length" in headers and "transfer-encoding" in headers and "expect" not in headers:
        words = "give a Content-Length or a Transfer-Encoding, not both"
        raise ApiError(411, "invalid_value", words)
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ApiError(415, "unsupported_encoding", "the body must not be compressed")
    if headers.get("expect", "100-continue").strip().lower() != "100-continue":
        raise ApiError(417, "invalid_value", "Expect may only be 100-continue")


def _has_key(headers: Headers, key: str | None) -> bool:
    """Whether a header has the key. Where there is no key, each request has it; clients without one
    send an empty `Bearer`.
    """
    if not key:
        return True
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    given += [headers["x-api-key"]] if "x-api-key" in headers else []
    return any([same_key(each, key) for each in given])


def _person_keys(settings: ServerSettings) -> dict[str, str]:
    return {name: person_key(str(settings.key), name) for name in settings.people}


def _person(scope: Scope, headers: Headers, settings: ServerSettings) -> str | None:
    """The person whose key, or whose cookie, comes with this request."""
    for name, key in _person_keys(settings).items():
        if _has_key(headers, key) or _has_cookie(scope, headers, key):
            return name
    return None


def _check_host(scope: Scope, headers: Headers, settings: ServerSettings) -> None:
    """Only names of this machine: another site can give its own name this machine's address, and
    then its pages would count as pages of this server.
    """
    if "host" not in headers and scope.get("http_version") == "1.0":
        return
    names = [headers.get("host", ""), *([scope["named_host"]] if "named_host" in scope else [])]
    own = {settings.host, *settings.allow_host, str((scope.get("server") or [""])[0])}
    for name in names:
        host = host_name(name)
        if not (is_loopback(host) or host in {each.lower().strip("[]") for each in own}):
            words = "the Host is not this machine; write 127.0.0.1, or start with --allow-host"
            raise ApiError(403, "forbidden_host", words)


def _check_origin(scope: Scope, headers: Headers, settings: ServerSettings) -> None:
    origin = headers.get("origin")
    if origin in settings.allow_origin and origin:
        return
    own = origin is not None and _netloc(origin) == headers.get("host", "").lower()
    site = headers.get("sec-fetch-site", "none").lower()
    visits = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
    foreign = origin is not None and not own and scope["method"] not in ("GET", "HEAD")
    if foreign or (site in ("cross-site", "same-site") and not visits):
        words = "pages of other sites are not answered; start with --allow-origin"
        raise ApiError(403, "forbidden_origin", words)


def _check_page_call(headers: Headers) -> None:
    """A form, or a page of another site, can send neither of the two without being asked."""
    if content_type(headers) != "application/json":
        words = "the Content-Type must be application/json"
        raise ApiError(415, "unsupported_media_type", words)
    if headers.get("x-gearshift") != "1":
        raise ApiError(403, "forbidden_origin", "the header `X-Gearshift: 1` is missing")


def content_type(headers: Mapping[str, str]) -> str:
    """The media type of a body, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def host_name(host: str) -> str:
    """The name or address in a Host header, without brackets and port."""
    name = re.sub(r":[0-9]*$", "", host.strip().lower()) if not _is_ip6(host) else host
    return name.removeprefix("[").removesuffix("]")


def _is_ip6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _has_cookie(scope: Scope, headers: Headers, key: str | None) -> bool:
    found = cookie_parser("; ".join(headers.getlist("cookie"))).get(_cookie_name(scope), "")
    return bool(key and found) and same_key(found, _cookie_value(str(key)))


def _cookie_name(scope: Scope) -> str:
    """Browsers share cookies between the ports of a host, so the name has the port."""
    return f"gearshift-{(scope.get('server') or [0, 0])[1]}"


def _cookie_value(key: str) -> str:
    return hmac.new(key.encode(), b"a page of gearshift", hashlib.sha256).hexdigest()
