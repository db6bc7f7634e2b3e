"""Rewards that run the code in a completion, always in the sandbox, against a row's tests.

A row has `tests`, a list of `{"stdin", "stdout"}` for a whole program; or `assertions`, Python that
calls the functions that the completion defines (one text, or a list of them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gearshift.errors import DataError
from gearshift.rollouts.answers import code_blocks, is_python, without_thoughts
from gearshift.rollouts.rewards import LOST, Rewards
from gearshift.rollouts.sandbox import LostError, check_sandboxed, run_sandboxed
from gearshift.types import Message


def code_reward(
    prompts: list[list[Message]],
    completions: list[str],
    tests: list[Any] | None = None,
    assertions: list[Any] | None = None,
    **_: Any,
) -> Rewards:
    """1 if the completion's code passes all of its row's tests, else 0; None for a row without."""
    return _score(completions, tests, assertions, lambda passed: float(all(passed)))


def code_share(
    prompts: list[list[Message]],
    completions: list[str],
    tests: list[Any] | None = None,
    assertions: list[Any] | None = None,
    **_: Any,
) -> Rewards:
    """The share of its row's tests that the completion's code passes; None for a row without."""

    def share(passed: Iterator[bool]) -> float:
        each = list(passed)
        return sum(each) / len(each)

    return _score(completions, tests, assertions, share)


def extract_code(completion: str) -> str:
    """The last fenced block of Python; else the last that names no language; else the whole text.
    Thoughts before the answer and blocks without a letter do not count.
    """
    answer = without_thoughts(completion)
    blocks = [block for block in code_blocks(answer) if block.content.strip()]
    python = [block for block in blocks if is_python(block)]
    found = python or [block for block in blocks if not block.language]
    return found[-1].content if found else answer


def _score(
    completions: list[str],
    tests: list[Any] | None,
    assertions: list[Any] | None,
    verdict: Callable[[Iterator[bool]], float],
) -> Rewards:
    none = [None] * len(completions)

    def one(completion: str, pairs: Any, texts: Any) -> float | None:
        if not pairs and not texts:
            return None
        try:
            return verdict(_passed(extract_code(completion), pairs or [], texts or []))
        except LostError:
            return LOST

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, completions, tests or none, assertions or none))


def _passed(code: str, pairs: Any, texts: Any) -> Iterator[bool]:
    """Each test's verdict, as it is asked for."""
    for pair in pairs:
        try:
            given, wanted = str(pair["stdin"]), str(pair["stdout"])
        except (TypeError, KeyError):
            raise DataError('A row of `tests` must be {"stdin": ..., "stdout": ...}.') from None
        outcome = run_sandboxed(code, given)
        yield outcome.status == "ok" and _lines(outcome.stdout) == _lines(wanted)
    for text in [texts] if isinstance(texts, str) else texts:
        status = check_sandboxed(code, text).status
        if status == "unusable":
            raise DataError(
                f"These assertions cannot be run, or pass what is not plain data: {text[:80]!r}."
            )
        yield status == "ok"


def _lines(text: str) -> list[str]:
    """What is compared: blanks at the ends of lines and of the text do not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
