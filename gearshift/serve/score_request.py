"""Checks the body of a request for scores. It must not use a socket or a model."""

from __future__ import annotations

import re
from typing import Any

from gearshift.rewards.http import MAX_ROWS
from gearshift.runtime.terminal import counted
from gearshift.serve.api_error import ApiError

MAX_MESSAGES = 1 << 14
"""The largest number of messages in all prompts of a request together."""


def samples_of(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a reward function in a request's body: `prompts`, `completions`, and `ended`
    where some completions were cut before their end. Raises `ApiError`.
    """
    prompts, completions = body.get("prompts"), body.get("completions")
    for name, value in (("prompts", prompts), ("completions", completions)):
        if not isinstance(value, list) or not value:
            raise ApiError(400, "invalid_value", f"{name} must be a list, and not empty")
    assert isinstance(prompts, list) and isinstance(completions, list)
    if len(completions) > MAX_ROWS:
        raise ApiError(
            413,
            "request_too_large",
            f"there are more than {MAX_ROWS} completions; send them in parts",
        )
    if len(prompts) != len(completions):
        raise ApiError(
            400,
            "invalid_value",
            f"the request has {counted(len(prompts), 'prompt')} and "
            f"{counted(len(completions), 'completion')}; send as many of both",
        )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise ApiError(
                400, "invalid_value", f'prompts[{i}] must be a list of {{"role", "content"}} texts'
            )
        if not _is_text(completion):
            raise ApiError(
                400, "invalid_value", f"completions[{i}] must be a text of Unicode characters"
            )
    if sum(map(len, prompts)) > MAX_MESSAGES:
        raise ApiError(
            413,
            "request_too_large",
            f"there are more than {MAX_MESSAGES} messages; send them in parts",
        )
    samples = {"prompts": prompts, "completions": completions}
    ended = body.get("ended", [True] * len(prompts))
    if not isinstance(ended, list) or [*map(type, ended)] != [bool] * len(prompts):
        raise ApiError(
            400, "invalid_value", "ended must be a list with true or false for each completion"
        )
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
