"""Reads a label that a page sends: what is wrong is refused by its field, what is unknown is not
stored.
"""

from __future__ import annotations

import re
from typing import Any

from gearshift.data.labels import KINDS, Event, Item, Labels
from gearshift.data.messages import read_messages
from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.serve.labelling.deal import order
from gearshift.serve.labelling.items import make_item

MAX_TEXT = 1 << 16
_MAX_REASON, _MAX_TAGS, _MAX_TAG, _MAX_NAME = 4000, 20, 60, 60
_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
_CHOICES = {"pair": ("left", "right", "tie", "bad"), "thumb": ("up", "down")}


def read_name(value: Any) -> str:
    """The name of a person. Raises `ApiError`."""
    name = " ".join(value.split()) if isinstance(value, str) else ""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _wrong("who", f"must be a name of 1 to {_MAX_NAME} characters")
    return name


def read_event(
    body: dict[str, Any], labels: Labels, criteria: tuple[str, ...], final: bool = False
) -> Event:
    """The event in the body of a request. A `final` label is the owner's, who sees the answers in
    the item's own order. Raises `ApiError`.
    """
    name, who, kind = _read_id(body), read_name(body.get("who")), body.get("kind")
    if kind == "undo" and not final:
        return _undo(name, who, body.get("undoes"), labels)
    if kind not in KINDS:
        raise _wrong("kind", f"must be one of {', '.join((*KINDS, 'undo'))}")
    item = labels.items.get(str(body.get("item")))
    if item is None:
        raise ApiError(404, "not_found", "there is no such item here", "item")
    _check_kind(kind, item)
    event: Event = {"id": name, "who": who, "item": item.id, "kind": kind}
    event["choice"] = _choice(body.get("choice"), kind, criteria)
    event["reason"] = _reason(body.get("reason"))
    event["edit"] = _edit(body.get("edit"), item)
    if kind == "edit" and event["edit"] is None:
        raise _wrong("edit", "must have the text of the edited answer")
    event["seconds"] = _seconds(body.get("seconds"))
    if final:
        return {**event, "shown": {"left": 0, "right": 1}, "final": True}
    event["shown"] = _shown(body.get("shown"), item, who)
    return event


def read_exchange(body: dict[str, Any]) -> tuple[Item, int]:
    """The item of two answers that a chat has shown side by side, and the number that the item
    gives to the left one. Raises `ApiError`.
    """
    try:
        prompt = read_messages(body.get("prompt"), "prompt")
    except DataError as error:
        raise ApiError(400, "invalid_value", one_line(str(error)), "prompt") from error
    answers, sources = body.get("answers"), body.get("sources")
    if not (isinstance(answers, list) and len(answers) == 2 and all(map(_is_text, answers))):
        raise _wrong("answers", f"must be two texts of 1 to {MAX_TEXT} characters")
    if answers[0] == answers[1]:
        raise _wrong("answers", "are the same text, so that neither is better")
    if not (isinstance(sources, list) and len(sources) == 2 and all(map(_is_source, sources))):
        raise _wrong("sources", "must say for each answer where it comes from")
    item = make_item(prompt, answers, sources)
    return item, item.answers.index(answers[0])


def read_choice(body: dict[str, Any], item: Item) -> Event:
    """The label of such an item, without the sides. Raises `ApiError`."""
    event: Event = {"id": _read_id(body), "who": read_name(body.get("who")), "item": item.id}
    event |= {"kind": "pair", "choice": _choice(body.get("choice"), "pair", ())}
    return {**event, "reason": None, "edit": None, "seconds": 0.0}


def _read_id(body: dict[str, Any]) -> str:
    name = body.get("id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise _wrong("id", "must be 8 to 64 letters, digits and hyphens")
    return name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_TEXT


def _is_source(value: Any) -> bool:
    """Whether it is a small object of names and numbers, perhaps with one such object in it."""
    plain = (str, int, float, type(None))

    def small(inner: Any, deep: bool) -> bool:
        if isinstance(inner, dict) and deep:
            return len(inner) <= 20 and all(small(one, False) for one in inner.values())
        return isinstance(inner, plain) and len(str(inner)) <= 200

    return (
        isinstance(value, dict) and len(value) <= 20 and all(small(v, True) for v in value.values())
    )


def shown(item: Item, who: str, seed: int) -> dict[str, int]:
    """Which answer a person sees on which side, and the seed that decided it."""
    if len(item.answers) == 1:
        return {"left": 0, "order_seed": seed}
    left = order(seed, item.id, who)
    return {"left": left, "right": 1 - left, "order_seed": seed}


def _undo(name: str, who: str, undoes: Any, labels: Labels) -> Event:
    label = labels.events.get(undoes) if isinstance(undoes, str) else None
    if label is None or label["kind"] not in KINDS or label["who"] != who:
        raise ApiError(404, "not_found", "this person has given no such label", "undoes")
    return {"id": name, "who": who, "item": label["item"], "kind": "undo", "undoes": undoes}


def _check_kind(kind: str, item: Item) -> None:
    answers = {"pair": 2, "thumb": 1, "rating": 1}.get(kind)
    if answers not in (None, len(item.answers)):
        raise _wrong("kind", f"is {kind}, and the item has {len(item.answers)} answers")


def _choice(value: Any, kind: str, criteria: tuple[str, ...]) -> Any:
    if kind in _CHOICES:
        if value not in _CHOICES[kind]:
            raise _wrong("choice", f"must be one of {', '.join(_CHOICES[kind])}")
        return value
    if kind != "rating":
        return None
    if not isinstance(value, dict) or set(value) != set(criteria):
        raise _wrong("choice", f"must rate {', '.join(criteria)}")
    if any(type(number) is not int or not 1 <= number <= 5 for number in value.values()):
        raise _wrong("choice", "must be whole numbers from 1 to 5")
    return value


def _reason(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong("reason", "must be an object with `text` and `tags`")
    text, tags = value.get("text", ""), value.get("tags", [])
    if not isinstance(text, str) or len(text) > _MAX_REASON:
        raise _wrong("reason", f"must have a text of at most {_MAX_REASON} characters")
    if not isinstance(tags, list) or len(tags) > _MAX_TAGS:
        raise _wrong("reason", f"must have a list of at most {_MAX_TAGS} tags")
    if any(not isinstance(tag, str) or len(tag) > _MAX_TAG for tag in tags):
        raise _wrong("reason", f"must have tags of at most {_MAX_TAG} characters")
    return {"text": text, "tags": tags} if text.strip() or tags else None


def _edit(value: Any, item: Item) -> dict[str, Any] | None:
    if value is None:
        return None
    answer, text = (value.get("answer"), value.get("text")) if isinstance(value, dict) else (0, 0)
    if type(answer) is not int or not 0 <= answer < len(item.answers):
        raise _wrong("edit", "must name the number of an answer")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise _wrong("edit", f"must have a text of 1 to {MAX_TEXT} characters")
    original = item.answers[answer]
    if text == (original if isinstance(original, str) else original.get("content")):
        raise _wrong("edit", "is the answer as it was")
    return {"answer": answer, "text": text}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise _wrong("seconds", "must be a number, 0 or more")
    return round(float(value), 1)


def _shown(value: Any, item: Item, who: str) -> dict[str, int]:
    """The sides as the person saw them: without them a label would be worth nothing."""
    seed = value.get("order_seed") if isinstance(value, dict) else None
    if type(seed) is not int or value != shown(item, who, seed):
        raise _wrong("shown", "must be as the item came")
    return shown(item, who, seed)


def _wrong(field: str, must: str) -> ApiError:
    return ApiError(400, "invalid_value", f"`{field}` {must}", field)
