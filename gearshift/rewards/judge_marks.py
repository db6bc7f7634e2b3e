"""Reads the mark in a judge's reply. If it is not clear, there is no mark: a wrong mark would be
trained on, and for a missing one the judge is asked again.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from gearshift.rewards.completion_text import without_thoughts

_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)(?:\s*(?:/|out\s+of)\s*(\d+(?:\.\d+)?))?"
# The number must not go on as a range, a percentage, a number with a comma, or a second fraction.
_NUMBER_ENDS = r"(?!\w|%|[.,]\d|\s*[-\u2013/]\s*\d|\s+(?:to|or)\s+\d)"
_NUMBER_ONLY = re.compile(rf"\s*{_NUMBER}\s*\.?\s*", re.IGNORECASE)
_IN_WORDS = re.compile(
    rf"""(?<!["'\w])score[*\s]*[:=][*\s]*{_NUMBER}{_NUMBER_ENDS}""", re.IGNORECASE
)
# `{'score': 8}`, or JSON that is broken after its mark; if it breaks within the number, it does not
# count.
_ALMOST_JSON = re.compile(
    rf"""\{{\s*["']score["']\s*:\s*["']?{_NUMBER}["']?\s*[,}}]""", re.IGNORECASE
)
# These characters may stand beside an object that is alone on its lines: a fence, or bold type.
_DECORATION = " \t`*."


def parse_mark(text: str, high: float | None = None) -> float | None:
    """The number that a reply gives; thoughts before it do not count.

    The first of these that applies counts, and the last one of its kind: the whole reply is a
    number; a JSON object `{"score": N}`, and one alone on its lines before one inside a sentence;
    `Score: N`. If JSON has a score, other text does not count. N is a number, in quotes or not.
    `N/M` is N if M is the best mark, `high`; otherwise it is no mark. A reply that is too long has
    no mark.
    """
    text = without_thoughts(text).strip()
    if len(text) > _MAX_LENGTH:
        return None
    if alone := _NUMBER_ONLY.fullmatch(text):
        return _number(alone, high)
    objects, rest = _objects(text)
    if objects:
        _, value = max(objects, key=lambda one: one[0])
        return _value(value, high)
    if nearly := {_number(m, high) for m in _ALMOST_JSON.finditer(rest)}:
        return nearly.pop() if len(nearly) == 1 else None
    words = [_number(m, high) for m in _IN_WORDS.finditer(rest)]
    return words[-1] if words else None


def _objects(text: str) -> tuple[list[tuple[tuple[bool, int], Any]], str]:
    """The scores of the JSON objects in a text, each with (whether it is alone on its lines, its
    position); and the text without the objects. An object inside another one does not count.
    """
    found, rest, place = [], "", 0
    while (start := text.find("{", place)) >= 0:
        rest += text[place:start]
        try:
            value, place = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = _closing_brace(text, start)
            rest += text[start:place]
            continue
        before, after = text[:start].rpartition("\n")[2], text[place:].partition("\n")[0]
        own_lines = before.strip(_DECORATION) in ("", "json") and not after.strip(_DECORATION)
        if "score" in value:
            found.append(((own_lines, start), value["score"]))
    return found, rest + text[place:]


def _closing_brace(text: str, start: int) -> int:
    """The position after the brace that closes the one at `start`, or the end of the text."""
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.end()
    return len(text)


def _keep_score(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The score of an object, and nothing else; if the object has two scores, it is None."""
    scores = [value for key, value in pairs if key.strip().lower() == "score"]
    return {"score": scores[0] if len(scores) == 1 else None} if scores else {}


def _no_constant(word: str) -> None:
    raise ValueError(f"JSON has no {word}.")


_MAX_LENGTH = 1 << 15
"""How many characters a reply with a mark may have: more braces than this would take minutes to
read.
"""
_DECODER = json.JSONDecoder(object_pairs_hook=_keep_score, parse_constant=_no_constant)


def _value(value: Any, high: float | None) -> float | None:
    if isinstance(value, str):
        alone = _NUMBER_ONLY.fullmatch(value)
        return _number(alone, high) if alone else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def _number(found: re.Match[str], high: float | None) -> float | None:
    mark, best = float(found[1]), found[2]
    of_another_scale = best is not None and high is not None and float(best) != high
    return None if of_another_scale or not math.isfinite(mark) else mark
