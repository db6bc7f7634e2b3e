"""The voice assistant's commands: how one is written, what it earns, and how one goes wrong.
This file must not import data or environments.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gearshift.errors import DataError
from gearshift.tasks.voice.grammar import INTENTS, Reading, read
from gearshift.tasks.voice.homes import Value
from gearshift.types import Message

Values = Mapping[str, Sequence[Value]]
"""The possible values of each slot."""
Item = TypeVar("Item")


def command_text(reading: Reading) -> str:
    """The command in the form that a model must write: `{"intent": "HassTurnOn", "area":
    "kitchen"}`.

    One line; the intent first, then the slots by name.
    """
    slots = dict(sorted(reading.slots.items()))
    return json.dumps({"intent": reading.intent, **slots}, ensure_ascii=False)


def score_command(completion: str, utterance: str, language: str = "en") -> float:
    """1 for the right command, less than 1 for any other JSON object, 0 for anything else.

    Wrong: 0.1 + 0.3 for the right intent + 0.4 * the fraction of slots with the right value, of all
    slots that the command or the right one has. So a slot that is left out costs as much as a wrong
    one. The order of the keys and white space around the object do not matter. Raises `DataError`
    if the parser cannot read the utterance.
    """
    gold = read(utterance, language)
    if gold is None:
        raise DataError(f"The parser cannot read `{utterance}`; take it out of the data.")
    try:
        command = json.loads(completion)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(command, dict):
        return 0.0
    intent = bool(command.pop("intent", None) == gold.intent)
    right = sum(_same(command.get(name), value) for name, value in gold.slots.items())
    if intent and right == len(gold.slots) == len(command):
        return 1.0
    slots = command.keys() | gold.slots.keys()
    return 0.1 + 0.3 * float(intent) + (0.4 * right / len(slots) if slots else 0.0)


def is_exact(completion: str, utterance: str, language: str = "en") -> bool:
    """Whether the completion is the right command."""
    return score_command(completion, utterance, language) == 1.0


def voice_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    *,
    utterance: list[str],
    language: list[str] | None = None,
    **_: Any,
) -> list[float | None]:
    """`score_command` with TRL's signature; None where the parser cannot read the utterance."""
    languages = language or ["en"] * len(utterance)
    return [
        score_command(completion, request, spoken) if read(request, spoken) else None
        for completion, request, spoken in zip(completions, utterance, languages, strict=True)
    ]


def _same(given: Any, gold: Value) -> bool:
    """Equal as JSON: 50 is 50.0, but neither "50" nor true is 1."""
    return not isinstance(given, bool) and bool(given == gold)


_MISTAKABLE = (
    ("HassTurnOn", "HassTurnOff"), ("HassMediaPause", "HassMediaUnpause"),
    ("HassVacuumStart", "HassVacuumReturnToBase"), ("HassStartTimer", "HassCancelTimer"),
    ("HassPauseTimer", "HassCancelTimer"), ("HassSetVolume", "HassSetVolumeRelative"),
    ("HassClimateGetTemperature", "HassClimateSetTemperature"),
    ("HassShoppingListAddItem", "HassListAddItem"), ("on", "off"), ("open", "closed"),
    ("up", "down"), ("locked", "unlocked"), ("area", "floor"), ("light", "fan"),
    ("light", "switch"), ("hours", "minutes"), ("minutes", "seconds"), ("start_minutes", "minutes"),
)  # fmt: skip
"""Groups of intents, slot names and values that are easily confused."""


def wrong_commands(
    requests: Iterable[tuple[str, str]], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """(right command, wrong command) for each (utterance, language) that the parser can read."""
    readings = [(*request, r) for request in requests if (r := read(*request))]
    values: dict[str, list[Value]] = {}
    for _, _, reading in readings:
        for name, value in reading.slots.items():
            values.setdefault(name, []).append(value)
    for utterance, language, gold in readings:
        right = command_text(gold)
        wrong = right
        while is_exact(wrong, utterance, language):
            wrong = rng.choice(_MISTAKES)(gold, values, rng)
        yield right, wrong


# A mistake that cannot be made in this command returns the command unchanged.


def _other_intent(gold: Reading, values: Values, rng: random.Random) -> str:
    return command_text(Reading(rng.choice(INTENTS), gold.slots))


def _mistaken(gold: Reading, values: Values, rng: random.Random) -> str:
    """The command with one word replaced by one that is easily confused with it."""
    text = command_text(gold)
    swaps = [(a, b) for pair in _MISTAKABLE for a, b in (pair, pair[::-1]) if f'"{a}"' in text]
    for a, b in _one(swaps, rng):
        text = text.replace(f'"{a}"', f'"{b}"', 1)
    return text


def _missing_slot(gold: Reading, values: Values, rng: random.Random) -> str:
    return command_text(gold.changed(dict.fromkeys(_one(gold.slots, rng))))


def _extra_slot(gold: Reading, values: Values, rng: random.Random) -> str:
    names = _one([name for name in values if name not in gold.slots], rng)
    return command_text(gold.changed({name: rng.choice(values[name]) for name in names}))


def _other_value(gold: Reading, values: Values, rng: random.Random) -> str:
    names = _one(gold.slots, rng)
    return command_text(gold.changed({name: rng.choice(values[name]) for name in names}))


def _broken(gold: Reading, values: Values, rng: random.Random) -> str:
    """JSON that does not parse: it is cut short, lacks a mark, or has the wrong quotes."""
    text = command_text(gold)
    place = rng.choice([match.start() for match in re.finditer(r'[":}]', text)])
    cut, lost = text[:place], text[:place] + text[place + 1 :]
    return rng.choice((cut, lost, text.replace('"', "'")))


def _prose(gold: Reading, values: Values, rng: random.Random) -> str:
    text = command_text(gold)
    order = " and ".join(f"{name} {value}" for name, value in gold.slots.items()) or gold.intent
    return rng.choice(
        (f"Sure! {text}", f"{text} Done.", f"Okay, I will do that: {order}.", "I cannot do that.")
    )


_MISTAKES: tuple[Callable[[Reading, Values, random.Random], str], ...] = (
    _other_intent, _mistaken, _mistaken, _missing_slot, _extra_slot, _other_value, _other_value,
    _broken, _prose,
)  # fmt: skip


def _one(items: Iterable[Item], rng: random.Random) -> list[Item]:
    """A list of one of the items, or an empty list if there are no items."""
    several = list(items)
    return rng.sample(several, min(1, len(several)))
