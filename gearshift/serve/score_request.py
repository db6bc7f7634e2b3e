"""Checks the host, the path and the body of a request for scores. It must not use a socket or a
model.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

from gearshift.rewards.http import MAX_ROWS
from gearshift.rewards.http_client import is_loopback
from gearshift.runtime.terminal import counted, one_line

MAX_MESSAGES = 1 << 14
"""The largest number of messages in all prompts of a request together."""


class RefusedError(Exception):
    """A request that is refused with this status and this text."""

    def __init__(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(words)
        self.status, self.headers = status, headers or {}


def parse_samples(data: bytes) -> dict[str, Any]:
    """The arguments of a reward function in a request's body: `prompts`, `completions`, and
    `ended` where some completions were cut before their end. Raises `RefusedError`.
    """
    try:
        body = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {one_line(str(error))}") from error
    return _samples(body)


def path_and_host(target: str) -> tuple[str, list[str]]:
    """The path in a request's first line, and the host if the line names one."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return "", []
    return parts.path.rstrip("/"), [parts.netloc] if parts.netloc else []


def is_local(host: str) -> bool:
    """Whether a Host header has a loopback address or is `localhost`."""
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
    """The checked prompts and completions of a request, and `ended` if some completions were cut
    before their end.
    """
    if not isinstance(body, dict):
        raise RefusedError(400, 'the body must be {"prompts": [...], "completions": [...]}')
    prompts, completions = body.get("prompts"), body.get("completions")
    for name, value in (("prompts", prompts), ("completions", completions)):
        if not isinstance(value, list) or not value:
            raise RefusedError(400, f"{name} must be a list, and not empty")
    assert isinstance(prompts, list) and isinstance(completions, list)
    if len(completions) > MAX_ROWS:
        raise RefusedError(413, f"there are more than {MAX_ROWS} completions; send them in parts")
    if len(prompts) != len(completions):
        raise RefusedError(
            400,
            f"the request has {counted(len(prompts), 'prompt')} and "
            f"{counted(len(completions), 'completion')}; send as many of both",
        )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise RefusedError(400, f'prompts[{i}] must be a list of {{"role", "content"}} texts')
        if not _is_text(completion):
            raise RefusedError(400, f"completions[{i}] must be a text of Unicode characters")
    if sum(map(len, prompts)) > MAX_MESSAGES:
        raise RefusedError(413, f"there are more than {MAX_MESSAGES} messages; send them in parts")
    samples = {"prompts": prompts, "completions": completions}
    ended = body.get("ended", [True] * len(prompts))
    if not isinstance(ended, list) or [*map(type, ended)] != [bool] * len(prompts):
        raise RefusedError(400, "ended must be a list with true or false for each completion")
    return samples if all(ended) else {**samples, "ended": ended}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and _is_text(message.get("role"))
        and _is_text(message.get("content"))
        and all(map(_is_text, message))
    )


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can encode, so without half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
