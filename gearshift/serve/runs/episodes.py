"""Episodes as the run page shows them: a row of a table, all figures by token, and what a filter
such as `reward<0.2 finish=length text~"json"` finds. It must not import torch.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.serve.runs.files import Record

FIGURES = ("logprobs", "trained_logprobs", "ref_logprobs", "advantages", "versions")
"""The figures of a record that belong to the tokens that the policy wrote."""
_SNIPPET = 160
_TERM = re.compile(
    r'\s*(?:([\w.]+)\s*(<=|>=|!=|=|<|>|~)\s*)?("(?:[^"\\]|\\.)*"|[^\s"<>=~]+)(?=\s|$)'
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "=": operator.eq, "!=": operator.ne,
}  # fmt: skip
_ALIASES = {"finish": "finish_reason", "group": "group_id"}


def expand(value: Any, count: int) -> list[Any]:
    """A figure of each token: records write one that all share as a number."""
    if isinstance(value, list):
        return (value + [None] * count)[:count]
    return [value if isinstance(value, int | float) else None] * count


def written(episode: Record) -> list[int]:
    """The mask of the tokens after the prompt. Where a record has none, all are the policy's."""
    count = len(_list(episode.get("token_ids")))
    return [int(bool(x)) for x in expand(episode.get("mask", 1), count)]


def by_token(episode: Record) -> dict[str, list[Any]]:
    """The token ids of an episode, its prompt first, with mask and figures for each; None where
    there is no figure.
    """
    prompt, ids = _list(episode.get("prompt_ids")), _list(episode.get("token_ids"))
    mask = [0] * len(prompt) + written(episode)
    columns: dict[str, list[Any]] = {"ids": [*prompt, *ids], "mask": mask}
    for name in FIGURES:
        if name in episode:
            values = iter(expand(episode[name], sum(mask)))
            columns[name] = [next(values) if m else None for m in mask]
    return columns


def summary(episode: Record, place: int, step: int) -> Record:
    """The row of an episode in a table; `place` is its number in the step."""
    advantages = [x for x in expand(episode.get("advantages"), sum(written(episode))) if x]
    versions = [x for x in expand(episode.get("versions"), 1) if x is not None]
    messages = [m for m in _list(episode.get("messages")) if isinstance(m, dict)]
    answer = messages.pop() if messages and messages[-1].get("role") == "assistant" else {}
    return {
        "step": step,
        "episode": place,
        "group_id": episode.get("group_id"),
        "reward": episode.get("reward"),
        "rewards": episode.get("rewards"),
        "length": sum(written(episode)),
        "finish_reason": episode.get("finish_reason"),
        "advantage": sum(advantages) / sum(written(episode)) if advantages else None,
        "version": versions[0] if versions else None,
        "left_out": episode.get("left_out"),
        "success": episode.get("success"),
        "row": episode.get("row"),
        "gold": episode.get("gold"),
        "prompt": _start(messages[-1] if messages else {}),
        "answer": _start(answer) if answer else _start({"content": episode.get("why")}),
    }


def brief(row: Record) -> Record:
    """The row as a table shows it: of a long right answer only the start."""
    gold = row["gold"]
    return {**row, "gold": gold[:_SNIPPET] if isinstance(gold, str) else gold}


@dataclass(frozen=True)
class Filter:
    """The terms of a filter; an episode must satisfy all of them."""

    terms: Sequence[tuple[str, str, str]]
    """(name, comparison, value)."""

    @classmethod
    def of(cls, text: str) -> Filter:
        """Read `reward<0.2 finish=length text~"json"`; a word alone is searched for in the texts.
        Raises `ApiError`.
        """
        terms, at = [], 0
        text = text.strip()
        while at < len(text):
            found = _TERM.match(text, at)
            if not found:
                words = f"the filter is not clear at `{one_line(text[at:], 40)}`; write name<value"
                raise ApiError(400, "invalid_value", f"{words}, name=value or name~text", "filter")
            name, how, value = found[1] or "text", found[2] or "~", found[3]
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            if how in ("<", "<=", ">", ">=") and _number(value) is None:
                words = f"`{one_line(name, 40)}{how}` needs a number"
                raise ApiError(400, "invalid_value", words, "filter")
            terms.append((_ALIASES.get(name, name), how, value))
            at = found.end()
        return cls(tuple(terms))

    def may_match(self, line: bytes) -> bool:
        """Whether a line of the file can have an episode that the filter finds. It is quick."""
        needles = [value for name, how, value in self.terms if (name, how) == ("text", "~")]
        plain = [json.dumps(v, ensure_ascii=False)[1:-1].lower() for v in needles if v.isascii()]
        lower = line.lower() if plain else line
        return all(needle.encode() in lower for needle in plain)

    def __call__(self, episode: Record, row: Record) -> bool:
        """Whether it finds this episode, whose row in the table is `row`."""
        return all(self._holds(episode, row, *term) for term in self.terms)

    def _holds(self, episode: Record, row: Record, name: str, how: str, value: str) -> bool:
        if name == "text":
            found: Any = "\n".join(_texts(episode))
        else:
            found = row.get(name, episode.get(name))
            head, _, part = name.partition(".")
            if found is None and part and isinstance(episode.get(head), Mapping):
                found = episode[head].get(part)
        if how == "~":
            return found is not None and value.lower() in str(found).lower()
        number = _number(value)
        if isinstance(found, bool):
            return _COMPARE[how](str(found).lower(), value.lower()) if how in ("=", "!=") else False
        if isinstance(found, int | float) and number is not None:
            return _COMPARE[how](found, number)
        words = "" if found is None else str(found)
        return how in ("=", "!=") and _COMPARE[how](words, "" if value == "none" else value)


def _texts(episode: Record) -> list[str]:
    """All texts of an episode."""
    found = [episode.get("why"), episode.get("gold")]
    for message in _list(episode.get("messages")):
        if isinstance(message, dict):
            found += [message.get("content"), message.get("reasoning_content")]
            if message.get("tool_calls"):
                found.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return [text for text in found if isinstance(text, str)]


def _start(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content[:_SNIPPET] if isinstance(content, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
