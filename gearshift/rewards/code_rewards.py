"""Rewards that run the code of a completion against its row's tests, always in the sandbox.

A row has `tests`, a list of `{"stdin", "stdout"}` for a whole program; or `assertions`, Python code
that calls the functions of the completion (one text, or a list of them). With assertions it may
have an `entry_point`, the name of the function that `def check(candidate)` tests. A row whose tests
no program could pass loses its rewards: a 0 would say that the program is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gearshift.rewards.completion_text import code_blocks, is_python, without_thoughts
from gearshift.rewards.functions import REWARD_MISSING, Rewards
from gearshift.rewards.sandbox import SandboxFailedError, check_sandboxed, run_sandboxed
from gearshift.types import Message


def code_reward(
    prompts: list[list[Message]],
    completions: list[str],
    tests: list[Any] | None = None,
    assertions: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    **_: Any,
) -> Rewards:
    """1 if the completion's code passes all tests of its row, else 0; None for a row without
    tests.
    """
    said, why = _score(completions, tests, assertions, entry_point, lambda p: float(all(p)))
    code_reward.last_failure = why  # type: ignore[attr-defined]
    return said


def code_share(
    prompts: list[list[Message]],
    completions: list[str],
    tests: list[Any] | None = None,
    assertions: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    **_: Any,
) -> Rewards:
    """The share of its row's tests that the completion's code passes; None for a row without
    tests.
    """

    def share(passed: Iterator[bool]) -> float:
        each = list(passed)
        return sum(each) / len(each)

    said, why = _score(completions, tests, assertions, entry_point, share)
    code_share.last_failure = why  # type: ignore[attr-defined]
    return said


def extract_code(completion: str) -> str:
    """The last fenced block of Python; else the last block without a language; else the whole text.
    Thoughts before the answer and empty blocks do not count.
    """
    answer = without_thoughts(completion)
    blocks = [block for block in code_blocks(answer) if block.content.strip()]
    python = [block for block in blocks if is_python(block)]
    found = python or [block for block in blocks if not block.language]
    return found[-1].content if found else answer


class _UnusableError(Exception):
    """No program could pass this row's tests."""


def _score(
    completions: list[str],
    tests: list[Any] | None,
    assertions: list[Any] | None,
    entry_points: list[Any] | None,
    verdict: Callable[[Iterator[bool]], float],
) -> tuple[Rewards, str]:
    """The reward of each completion, and why one of them was lost."""
    columns = [column or [None] * len(completions) for column in (tests, assertions, entry_points)]
    lost: list[str] = []

    def one(completion: str, pairs: Any, texts: Any, entry_point: Any) -> float | None:
        if not pairs and not texts:
            return None
        try:
            return verdict(_passed(extract_code(completion), pairs or [], texts or [], entry_point))
        except (_UnusableError, SandboxFailedError) as error:
            lost.append(str(error))
            return REWARD_MISSING

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        said = list(pool.map(one, completions, *columns))
    return said, lost[-1] if lost else ""


def _passed(code: str, pairs: Any, texts: Any, entry_point: Any) -> Iterator[bool]:
    """The result of each test; a test runs only when its result is needed."""
    for pair in _list("tests", pairs):
        if not isinstance(pair, dict) or not {"stdin", "stdout"} <= pair.keys():
            raise _UnusableError(
                f'a row of `tests` must be {{"stdin": ..., "stdout": ...}}: {repr(pair)[:80]}'
            )
        outcome = run_sandboxed(code, _text(pair["stdin"]))
        yield outcome.status == "ok" and _lines(outcome.stdout) == _lines(_text(pair["stdout"]))
    for text in [texts] if isinstance(texts, str) else _list("assertions", texts):
        if not isinstance(text, str):
            raise _UnusableError(f"`assertions` must be texts, not {repr(text)[:80]}")
        outcome = check_sandboxed(code, text, entry_point=str(entry_point or ""))
        if outcome.status == "unusable":
            raise _UnusableError(
                f"no program can pass these assertions, because {outcome.why}: {text[:80]!r}"
            )
        yield outcome.status == "ok"


def _list(column: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _UnusableError(f"`{column}` must be a list, not {repr(value)[:80]}")
    return list(value)


def _text(value: Any) -> str:
    """A text for standard input or output; a list becomes its lines."""
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return "" if value is None else str(value)
    raise _UnusableError(f"`stdin` and `stdout` must be texts, not {repr(value)[:80]}")


def _lines(text: str) -> list[str]:
    """The lines to compare: spaces at the end of a line and empty space at the end of the text do
    not count.
    """
    lines = text.replace("\r\n", "\n").rstrip(" \t\r\n").split("\n")
    return [line.rstrip(" \t\r") for line in lines]
