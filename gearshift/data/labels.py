"""Labels of people: the events of a labelling, the state that they add up to, and the rows that
stages learn from. This file must not import a server.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.types import Message

Event = dict[str, Any]
"""One line of the file: an item that is asked, a label, or an undo."""
Format = Literal["preference", "judged", "messages"]
FORMATS: tuple[Format, ...] = ("preference", "judged", "messages")
Verdict = int | str
"""The number of the better answer, or a word: `tie`, `bad` (both are), `up`, `down`."""
Decided = tuple[Verdict, float, list[str]]
"""A verdict, the share of people who gave it, and all people who gave one."""
FILE, PREFIX, SUFFIX = "events.jsonl", "labels:", ".labels"
KINDS = ("pair", "thumb", "rating", "edit", "skip")
"""The kinds of a label. The other kinds of an event are `item` and `undo`."""
_REQUIRED = {"id", "kind", "item", "who", "t", "app"}


@dataclass(frozen=True, slots=True)
class Item:
    """What people are asked: a prompt with one or two answers."""

    id: str
    prompt: list[Message]
    answers: list[str | Message]
    options: dict[str, Any] = field(default_factory=dict)
    """The arguments of the chat template besides the messages, for example `tools`."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """For each answer, where it comes from; people do not see it."""
    gold: int | None = None
    """The number of the answer that is known to be better; None where nothing is known."""
    number: int = 0
    """How many items came before."""


def item_id(prompt: list[Message], answers: Iterable[str | Message], options: Any = None) -> str:
    """The name of an item by its content; it does not depend on the order of the answers."""
    content = [prompt, sorted(json.dumps(a, sort_keys=True) for a in answers), options or {}]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


class Labels:
    """What the events add up to. An undone label stays in the file and counts for nothing."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.items: dict[str, Item] = {}
        self.events: dict[str, Event] = {}
        self.undone: set[str] = set()
        self._given: dict[str, dict[str, list[Event]]] = {}
        for event in events:
            self.add(event)

    def add(self, event: Event) -> bool:
        """Take in one event; returns False for one that is known already."""
        if event["id"] in self.events:
            return False
        self.events[event["id"]] = event
        if event["kind"] == "item":
            self.items[event["item"]] = _item(event, len(self.items))
        elif event["kind"] == "undo":
            self._undo(event["undoes"])
        else:
            self._given.setdefault(event["item"], {}).setdefault(event["who"], []).append(event)
        return True

    def _undo(self, name: str) -> None:
        label = self.events.get(name)
        if label and label["kind"] in KINDS and name not in self.undone:
            self.undone.add(name)
            self._given[label["item"]][label["who"]].remove(label)

    def of(self, item: str) -> dict[str, Event]:
        """The labels of an item: the last one of each person, without the final ones."""
        given = self._given.get(item, {})
        last = {who: [e for e in events if not e.get("final")] for who, events in given.items()}
        return {who: events[-1] for who, events in last.items() if events}

    def has_any(self, item: str) -> bool:
        """Whether anybody has labelled the item, now or before an undo."""
        return item in self._given

    def final(self, item: str, by: Collection[str] = ()) -> Event | None:
        """The label that decides where people disagreed; None where there is none."""
        given = self._given.get(item, {})
        found = [e for w, all_of in given.items() if not by or w in by for e in all_of]
        return next((e for e in reversed(found) if e.get("final")), None)

    def live(self) -> Iterator[Event]:
        """All labels that count, item by item."""
        for item in self._given:
            yield from self.of(item).values()

    def verdict(self, item: str, by: Collection[str] = ()) -> Decided | None:
        """What most people chose; None where no choice is ahead of the others. A final label
        decides alone.
        """
        votes = {
            who: vote
            for who, event in self.of(item).items()
            if (not by or who in by) and (vote := choice_of(event)) is not None
        }
        final = self.final(item, by)
        if final and (decided := choice_of(final)) is not None:
            share = sum(v == decided for v in votes.values()) / len(votes) if votes else 1.0
            return decided, share, sorted({*votes, final["who"]})
        first = Counter(votes.values()).most_common(2)
        if not first or (len(first) == 2 and first[0][1] == first[1][1]):
            return None
        return first[0][0], first[0][1] / len(votes), sorted(votes)


def choice_of(event: Event) -> Verdict | None:
    """What a label says about the answers, whichever of them was on the left; None: nothing."""
    choice = event.get("choice")
    if event["kind"] == "pair" and choice in ("left", "right"):
        return int(event["shown"][choice])
    if event["kind"] == "rating":
        mean = sum(choice.values()) / len(choice) if isinstance(choice, dict) and choice else 3.0
        return "up" if mean > 3 else "down" if mean < 3 else None
    return str(choice) if event["kind"] in ("pair", "thumb") and choice else None


def read_events(file: Path) -> tuple[list[Event], int]:
    """(the events of a file, how many bytes they are). A last line that was not written to its end
    is left out. Raises `DataError` for any other line that is no event.
    """
    try:
        whole = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check the path.") from None
    size = whole.rfind(b"\n") + 1
    lines = whole[:size].split(b"\n")[:-1]
    return [_event(line, f"{file}, line {i}") for i, line in enumerate(lines, start=1)], size


def _event(line: bytes, where: str) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not set(event) >= _REQUIRED:
        raise DataError(f"{where} is no event of a labelling; put the file back as it was.")
    return event


def source_file(path: str) -> Path:
    """The file that a source of rows names: `labels:RUN` and a folder `FILE.labels` name the file
    of their events.
    """
    if path.startswith(PREFIX):
        return Path(path.removeprefix(PREFIX)).expanduser() / "labels" / FILE
    file = Path(path).expanduser()
    return file / FILE if file.suffix == SUFFIX and file.is_dir() else file


def is_label_file(file: Path) -> bool:
    """Whether the file has the events of a labelling, and not the rows of a user."""
    if file.name != FILE or not file.is_file():
        return False
    with file.open("rb") as opened:
        line = opened.readline(1 << 24)
    try:
        _event(line, "")
    except DataError:
        return False
    return True


def label_rows(
    labels: Labels,
    format: Format | None = None,
    min_agree: float = 0.0,
    by: Collection[str] = (),
    ties: bool = False,
) -> Iterator[dict[str, Any]]:
    """The rows that the labels give in one format; None gives those of every format.

    `min_agree`: the least share of people that chose what most chose, unless a final label decided.
    `by`: only labels of these people count. `ties`: keep ties and pairs of two bad answers. Items
    whose better answer was known before give no rows.
    """
    for item in labels.items.values():
        if item.gold is not None:
            continue
        if format in ("messages", None):
            yield from _edited(labels, item, by)
        if format in ("preference", None):
            yield from _edit_pairs(labels, item, by)
        found = labels.verdict(item.id, by)
        if found is None or (found[1] < min_agree and not labels.final(item.id, by)):
            continue
        verdict, share, people = found
        said = {"labellers": people, "agreement": round(share, 4)}
        if format in ("preference", None):
            yield from _pairs(item, verdict, said, ties)
        if format == "judged" or (format is None and len(item.answers) == 1):
            yield from _judged(item, verdict, said, ties)


def _pairs(item: Item, verdict: Verdict, said: Any, ties: bool) -> Iterator[dict[str, Any]]:
    tied = verdict in ("tie", "bad")
    if len(item.answers) != 2 or (tied and not ties):
        return
    # Neither answer of a tie is better, so chance decides which one is named first.
    first = int(item.id, 16) % 2 if isinstance(verdict, str) else verdict
    row = _row(item, said, chosen=first, rejected=1 - first)
    yield {**row, "margin": 0, "tie": verdict} if tied else row


def _judged(item: Item, verdict: Verdict, said: Any, ties: bool) -> Iterator[dict[str, Any]]:
    if verdict in ("tie", "bad") and not ties:
        return
    for i in range(len(item.answers)):
        good = verdict == i if isinstance(verdict, int) else verdict in ("tie", "up")
        yield {**_row(item, said, completion=i), "label": good}


def _edit_pairs(labels: Labels, item: Item, by: Collection[str]) -> Iterator[dict[str, Any]]:
    """What a person wrote is better than what it was written from."""
    for event in _edits(labels, item, by):
        original = event["edit"]["answer"]
        row = _row(item, _one(event), rejected=original)
        yield {**row, "chosen": _written(item, event)}


def _edited(labels: Labels, item: Item, by: Collection[str]) -> Iterator[dict[str, Any]]:
    for event in _edits(labels, item, by):
        asked = [{**m, "train": False} if m["role"] == "assistant" else m for m in item.prompt]
        written = _written(item, event)
        answer = {"role": "assistant", "content": written} if isinstance(written, str) else written
        source = {"edited": _source(item, event["edit"]["answer"])}
        row = {"messages": [*asked, answer], **item.options, **_one(event), "source": source}
        yield row


def _edits(labels: Labels, item: Item, by: Collection[str]) -> Iterator[Event]:
    for who, event in labels.of(item.id).items():
        if event.get("edit") and (not by or who in by):
            yield event


def _written(item: Item, event: Event) -> str | Message:
    original, text = item.answers[event["edit"]["answer"]], event["edit"]["text"]
    return text if isinstance(original, str) else {**original, "content": text}


def _one(event: Event) -> dict[str, Any]:
    return {"labellers": [event["who"]], "agreement": 1.0}


def _row(item: Item, said: dict[str, Any], **answers: int) -> dict[str, Any]:
    found = {name: item.answers[i] for name, i in answers.items()}
    source = {name: _source(item, i) for name, i in answers.items()}
    return {"prompt": item.prompt, **found, **item.options, **said, "source": source}


def _source(item: Item, answer: int) -> dict[str, Any]:
    return item.sources[answer] if answer < len(item.sources) else {}


def _item(event: Event, number: int) -> Item:
    try:
        prompt, answers = event["prompt"], event["answers"]
    except KeyError as error:
        words = f"the event {one_line(str(event['id']))} has no {error}; put the file back"
        raise DataError(f"{words} as it was.") from None
    options, sources = event.get("options") or {}, event.get("source") or []
    return Item(event["item"], prompt, answers, options, sources, event.get("gold"), number)


def rows_text(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
