"""A task's own part of the chat page: its state after a conversation, and speech in and out.

The task is given as functions, because this package knows no task. Nothing stays on the disk.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gearshift.errors import DataError, GearshiftError
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.speech import missing, speak
from gearshift.serve.wire import messages_of
from gearshift.types import Message

LONGEST_WAV = 1 << 20
"""The most bytes of a recording: about 32 seconds of 16 bits at 16,000 Hz."""
LONGEST_SPEECH = 500
"""The most characters that are spoken."""
MOST_MESSAGES = 500
_FRESH = {"Cache-Control": "no-store"}
_one_at_a_time = threading.Lock()
"""A recogniser is kept between calls and serves one thread."""


@dataclass(frozen=True, slots=True)
class Panel:
    """The panel of the served run's task."""

    folder: Path
    """Its files; the page loads `panel.js`."""
    state: Callable[[Sequence[Message]], Mapping[str, Any]]
    """(conversation) -> what the panel draws. Raises `GearshiftError`."""
    hear: Callable[[str], str]
    """(path of a WAV file) -> the words in it. Raises `GearshiftError`."""
    single: bool = False
    """Whether the model gets each message alone."""
    recogniser: str | None = None
    """The user's own recogniser, where `hear` uses one."""

    def about(self) -> dict[str, Any]:
        """What the page needs to know first."""
        return {"single": self.single, "missing": missing(self.recogniser)}


def panel_routes(panel: Panel) -> list[BaseRoute]:
    """`POST /api/task/state`, `/api/task/hear` and `/api/task/speak`. Recordings travel as base64
    in JSON, because a page of another site cannot send JSON.
    """

    async def state(request: Request) -> Response:
        messages = _messages((await json_object(request)).get("messages"))
        return await _answer(partial(panel.state, messages))

    async def hear(request: Request) -> Response:
        wav = _decoded((await json_object(request)).get("wav"))
        return await _answer(partial(_heard, panel.hear, wav))

    async def say(request: Request) -> Response:
        body = await json_object(request)
        text, language = body.get("text"), body.get("language", "en")
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_SPEECH:
            words = f"text must have 1 to {LONGEST_SPEECH} characters"
            raise ApiError(400, "invalid_value", words, "text")
        if not isinstance(language, str) or not re.fullmatch("[a-z]{2}", language):
            raise ApiError(400, "invalid_value", "language must be two letters", "language")
        return await _answer(partial(_spoken, text, language))

    handlers: Mapping[str, Callable[[Request], Awaitable[Response]]]
    handlers = {"state": state, "hear": hear, "speak": say}
    return [Route(f"/api/task/{name}", each, methods=["POST"]) for name, each in handlers.items()]


async def _answer(work: Callable[[], Mapping[str, Any]]) -> Response:
    """What the work gives, done in a thread. What it refuses is status 400, what is not installed
    or not set is 501.
    """
    try:
        found = await anyio.to_thread.run_sync(work)
    except ApiError:
        raise
    except DataError as error:
        raise ApiError(400, "invalid_value", str(error)) from error
    except GearshiftError as error:
        raise ApiError(501, "not_installed", str(error)) from error
    # With escapes, because half a surrogate pair of a model's text is no UTF-8.
    return Response(json.dumps(found), media_type="application/json", headers=_FRESH)


def _heard(hear: Callable[[str], str], wav: bytes) -> dict[str, str]:
    with _one_at_a_time, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.wav"
        path.write_bytes(wav)
        try:
            return {"text": hear(str(path))}
        except DataError as error:
            raise DataError(str(error).replace(str(path), "The recording")) from error


def _spoken(text: str, language: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.wav"
        speak(text, path, language)
        return {"wav": base64.b64encode(path.read_bytes()).decode()}


def _messages(given: Any) -> list[Message]:
    known = isinstance(given, list) and len(given) <= MOST_MESSAGES
    if not known or not all(isinstance(message, dict) for message in given):
        words = f"messages must be a list of at most {MOST_MESSAGES} objects"
        raise ApiError(400, "invalid_value", words, "messages")
    return messages_of(given)


def _decoded(given: Any) -> bytes:
    try:
        wav = base64.b64decode(given if isinstance(given, str) else "?", validate=True)
    except binascii.Error as error:
        words = "wav must be a WAV file in base64"
        raise ApiError(400, "invalid_value", words, "wav") from error
    if len(wav) > LONGEST_WAV:
        words = f"the recording has more than {LONGEST_WAV} bytes; speak for half a minute"
        raise ApiError(413, "request_too_large", words, "wav")
    return wav
