"""Reads the JSON of a request strictly: no key twice, no NaN, no endless depth."""

from __future__ import annotations

import json
import threading
from typing import Any

import anyio.to_thread
from starlette.requests import Request

from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.serve.guard import content_type

_SMALL = 1 << 16
"""Bytes that are parsed at once; a larger body is parsed in a thread, one at a time, because JSON
of many small parts takes twenty times its size in memory."""
_one_at_a_time = threading.Lock()


async def json_object(request: Request) -> dict[str, Any]:
    """The object in the body. Raises `ApiError`: 415 for another content type, 400 for no JSON."""
    if content_type(request.headers) != "application/json":
        words = "the Content-Type must be application/json"
        raise ApiError(415, "unsupported_media_type", words)
    data = await request.body()
    if len(data) < _SMALL:
        return parse_object(data)
    return await anyio.to_thread.run_sync(_parse_alone, data)


def _parse_alone(data: bytes) -> dict[str, Any]:
    with _one_at_a_time:
        return parse_object(data)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in these bytes. Raises `ApiError`."""
    try:
        body = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        words = f"the body is not JSON: {one_line(str(error))}"
        raise ApiError(400, "invalid_json", words) from error
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_value", "the body must be a JSON object")
    return body


def _no_constant(word: str) -> None:
    raise ValueError(f"it has no {word}")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
