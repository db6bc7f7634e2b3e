"""What is wrong with a config, in one line: the key, what was given, what is wanted."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gearshift.runtime.keys import leaves, models_of, short, tags_of
from gearshift.runtime.terminal import one_line


def explain(cls: type[BaseModel], tree: dict[str, Any], errors: list[ErrorDetails]) -> str:
    """Explain the first error. Branches of a union that failed at the same key count as one
    error.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    # A misspelt key often comes with a missing one; then the spelling is the more useful error.
    for error in sorted(errors, key=lambda e: e["type"] != "extra_forbidden"):
        by_key.setdefault(_dotted(cls, tree, error), []).append(error)
    key, same = next(iter(by_key.items()))
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    kind = same[0]["type"]
    shown = one_line(key, 100)
    if kind == "extra_forbidden":
        return f"unknown key `{shown}`; {_nearest(cls, same[0]['loc'], key)}{more}"
    if kind == "missing":
        return f"`{shown}` is missing; it has no default.{more}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(list(_steps(cls, same[0]["loc"]).kinds), key, same[0])
    wanted = " or ".join(dict.fromkeys(_wanted(e) for e in same))
    if kind == "model_attributes_type" and (kinds := _steps(cls, same[0]["loc"]).kinds):
        wanted += f", such as {{{_tag(kinds, same[0]['input'])}}}"
    if kind == "value_error":
        return f"`{shown}`: {wanted}{more}" if key else f"{wanted}{more}"
    return f"`{shown}` is {short(same[0]['input'])}; it should be {wanted}.{more}"


def _tag_problem(known: list[str], key: str, error: ErrorDetails) -> str:
    """Explain that the key that selects one of several sections is missing or wrong."""
    name = error["ctx"]["discriminator"].strip("'")
    which, section = f"{key}.{name}", error["input"]
    tag = error["ctx"].get("tag")
    if tag is None:
        return f"`{which}` is missing; there are {', '.join(known)}."
    near = difflib.get_close_matches(str(tag), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    given = section.get(name) if isinstance(section, dict) else tag
    return f"`{which}` is {short(given)}; {hint}"


def _tag(kinds: dict[str, type[BaseModel]], given: Any) -> str:
    """The kind that was given in place of a section, or else the first one, as the section says it:
    `name: gae`.
    """
    tag = given if isinstance(given, str) and given in kinds else next(iter(kinds))
    model = kinds[tag]
    fields = model.model_fields.items()
    return next(f"{name}: {tag}" for name, f in fields if tag in typing.get_args(f.annotation))


class _Steps:
    """The way that pydantic's location takes through the sections of a config."""

    def __init__(self, cls: type[BaseModel]) -> None:
        self.level: list[type[BaseModel]] = [cls]
        """The sections that the way has come to."""
        self.kind = ""
        """The name of the one that this is, where a section may be of several kinds."""
        self.kinds: dict[str, type[BaseModel]] = {}
        """All of the kinds, by name."""

    def go(self, part: int | str) -> bool:
        """One step; whether it is a key, not a kind. A list's index and a dict's key lead nowhere:
        the sections inside are at hand.
        """
        if not self.kind and part in self.kinds:
            self.kind = str(part)
            self.level = [self.kinds[self.kind]]
            return False
        fields = [model.model_fields[part] for model in self.level if part in model.model_fields]
        if fields:
            self.kind = ""
            self.kinds = {tag: model for field in fields for tag, model in tags_of(field).items()}
            self.level = [model for field in fields for model in models_of(field.annotation)]
        return bool(fields)


def _steps(cls: type[BaseModel], loc: Sequence[int | str]) -> _Steps:
    steps = _Steps(cls)
    for part in loc:
        steps.go(part)
    return steps


def _dotted(cls: type[BaseModel], node: Any, error: ErrorDetails) -> str:
    """The key as the user writes it: pydantic's location without the names of union branches."""
    keys, steps = [], _Steps(cls)
    for i, part in enumerate(error["loc"]):
        known = steps.go(part)
        indices = range(len(node)) if isinstance(node, list) else ()
        inside = part in (node if isinstance(node, dict) else indices)
        if part == steps.kind and not known:
            continue
        node = node[part] if inside else None if known else node
        if inside or known or (error["type"] == "missing" and i == len(error["loc"]) - 1):
            keys.append(str(part))
    return ".".join(keys)


def _wanted(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "a section with keys of its own"
    if error["type"] in ("tuple_type", "list_type"):
        return "a list"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.removeprefix("Input should be ").split(", unable to")[0]


def _nearest(cls: type[BaseModel], loc: Sequence[int | str], key: str) -> str:
    """Suggest the key that the user may have meant instead of an unknown one."""
    *path, last = key.split(".")
    steps = _steps(cls, loc[:-1])
    keys = list(dict.fromkeys(name for model in steps.level for name in model.model_fields))
    listed = f"the keys there are {', '.join(keys)}."
    if others := [tag for tag, model in steps.kinds.items() if last in model.model_fields]:
        has = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'}"
        return f"{steps.kind} has no {last}, {has}; {listed}"
    near = difflib.get_close_matches(last, keys, n=1)
    elsewhere = [] if steps.kind else [path[:depth] for depth in range(len(path), -1, -1)]
    meant = _inside(cls, path, last) if path and elsewhere else []
    meant = meant or [".".join([*path, name]) for name in near]
    for section in elsewhere:
        meant = meant or _inside(cls, section, last)
    named = " or ".join(f"`{name}`" for name in meant[:3])
    return f"did you mean {named}?" if named else listed


def _inside(cls: type[BaseModel], path: Sequence[str], last: str) -> list[str]:
    """The keys in the section at `path` that have this name, alone or after their section's; else
    those that a part of it names (`reward_clip`: `clip`), or that are spelt nearly so; without a
    spelling that is very near, also those with the same last word.
    """
    ways = [re.sub(r"\[.*?\]", "", key).split(".") for key, _ in leaves(cls)]
    known = dict.fromkeys(".".join(way[: i + 1]) for way in ways for i in range(len(way)))
    inside = "".join(f"{part}." for part in path)
    names = {key: key.removeprefix(inside).split(".") for key in known if key.startswith(inside)}
    same = [key for key, name in names.items() if last in (name[-1], "_".join(name))]
    if same or not path:
        return same
    part = [
        key
        for key, name in names.items()
        if last.endswith(f"_{name[-1]}") or f"_{last}_" in f"_{name[-1]}_"
    ]
    ends = [name[-1] for name in names.values()]
    typo, near = (difflib.get_close_matches(last, ends, n=1, cutoff=c) for c in (0.85, 0.7))
    noun = last.rpartition("_")[2]  # `max_tokens` may be any number of tokens
    near += [] if typo or noun == last else [end for end in ends if end.endswith(f"_{noun}")]
    found = [key for end in near for key, name in names.items() if name[-1] == end]
    return part or list(dict.fromkeys(found))
