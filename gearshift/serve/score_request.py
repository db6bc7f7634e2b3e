"""What a request for scores may say: its host, its path and its body. No socket and no model is
used here.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

from gearshift.rewards.http import MAX_ROWS
from gearshift.rewards.http_client import is_loopback
from gearshift.runtime.terminal import one_line

MAX_MESSAGES = 1 << 14
"""The largest number of messages in all prompts of a request together."""


class RefusedError(Exception):
    """A request that is answered with this status and these words."""

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
    """The path of a request's line, and the host where the line names one."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return "", []
    return parts.path.rstrip("/"), [parts.netloc] if parts.netloc else []


def is_local(host: str) -> bool:
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
        raise RefusedError(400, 'the body must be {"prompts": [...], "completions": [...]}')
    prompts, completions = body.get("prompts"), body.get("completions")
    for name, value in (("prompts", prompts), ("completions", completions)):
        if not isinstance(value, list) or not value:
            raise RefusedError(400, f"{name} must be a list, and not empty")
    assert isinstance(prompts, list) and isinstance(completions, list)
    if len(completions) > MAX_ROWS:
        raise RefusedError(413, f"more than {MAX_ROWS} completions; send them in parts")
    if len(prompts) != len(completions):
        raise RefusedError(400, f"{len(prompts)} prompts and {len(completions)} completions")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise RefusedError(400, f'prompts[{i}] must be a list of {{"role", "content"}} texts')
        if not _is_text(completion):
            raise RefusedError(400, f"completions[{i}] must be a text of Unicode")
    if sum(map(len, prompts)) > MAX_MESSAGES:
        raise RefusedError(413, f"more than {MAX_MESSAGES} messages; send them in parts")
    samples = {"prompts": prompts, "completions": completions}
    ended = body.get("ended", [True] * len(prompts))
    if not isinstance(ended, list) or [*map(type, ended)] != [bool] * len(prompts):
        raise RefusedError(400, "ended must be a list of true and false, one a completion")
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
