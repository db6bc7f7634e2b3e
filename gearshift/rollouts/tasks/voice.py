"""The voice assistant: requests for a home in plain words, to be written as one JSON command.

The sentences are Home Assistant's own templates, and its parser's reading of a request is the right
answer (see `voice_grammar`). A room of its own because all that this task asks of a model stands
here; it knows no model and no trainer.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from gearshift.errors import DataError
from gearshift.rollouts.environment import RowEnvironment
from gearshift.rollouts.gym_text import make_environment
from gearshift.rollouts.tasks.task import Task
from gearshift.rollouts.tasks.voice_grammar import (
    CLUMSY,
    INTENTS,
    Grammar,
    Reading,
    Template,
    Value,
    grammar,
    read,
)
from gearshift.runtime.config import Config
from gearshift.runtime.seeding import named_seed
from gearshift.types import Message

SYSTEM = "Write the request as one JSON command for the home."

Row = dict[str, Any]
Values = Mapping[str, Sequence[Value]]
"""Values to be had for each slot."""
Draw = tuple[str, Template]
"""A request, and the template that wrote it."""
Item = TypeVar("Item")

# How often an intent may fail to say something new before it counts as exhausted.
_TRIES = 60


class VoiceConfig(Config):
    """The voice assistant's data: what is written, and how much of it."""

    name: Literal["voice_assistant"] = "voice_assistant"
    """Which task this is."""
    labelled: int = Field(64, ge=1)
    """Requests with their commands, for supervised fine-tuning."""
    train: int = Field(2000, ge=1)
    """Requests without commands, for reinforcement learning."""
    pairs: int = Field(384, ge=1)
    """Right against wrong commands, for the reward model."""
    pairs_heldout: int = Field(128, ge=1)
    """The same, from held-out templates."""
    heldout: int = Field(256, ge=1)
    """Requests from held-out templates, which no training template reads."""
    heldout_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of each intent's sentence templates that training never sees."""
    language: Literal["en"] = "en"
    """Language of the requests."""


# Commands and their score


def command_text(reading: Reading) -> str:
    """The command as a model is to write it: `{"intent": "HassTurnOn", "area": "kitchen"}`.

    One line; the intent first, then the slots by name.
    """
    slots = dict(sorted(reading.slots.items()))
    return json.dumps({"intent": reading.intent, **slots}, ensure_ascii=False)


def score_command(completion: str, utterance: str) -> float:
    """1 for the right command, less than 1 for any other JSON object, 0 for anything else.

    Wrong: 0.1 + 0.3 for the right intent + 0.4 * the fraction of slots with the right value, of all
    that the command or the right one has. So leaving a slot out is no better than getting it wrong.
    The order of the keys and white space around the object do not matter. Raises `DataError` if
    the parser cannot read the utterance.
    """
    gold = read(utterance)
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


def is_exact(completion: str, utterance: str) -> bool:
    """Whether the completion is the right command."""
    return score_command(completion, utterance) == 1.0


def voice_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    *,
    utterance: list[str],
    **_: Any,
) -> list[float | None]:
    """`score_command` with TRL's signature; None where the parser cannot read the utterance."""
    return [
        score_command(completion, request) if read(request) else None
        for completion, request in zip(completions, utterance, strict=True)
    ]


def _same(given: Any, gold: Value) -> bool:
    """Equal as JSON: 50 is 50.0, but neither "50" nor true is 1."""
    return not isinstance(given, bool) and bool(given == gold)


# The environment


class VoiceAssistantEnvironment(RowEnvironment):
    """One request, one command. `info` says `exact` (and `success`), `gold` and `utterance`."""

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 256) -> None:
        """Over the rows of a JSONL file, or over `rows` requests that `seed` draws.

        Raises `DataError` if the file is missing or holds no requests.
        """
        if path is None:
            super().__init__(_sampled(seed, rows), voice_reward)
        else:
            super().__init__(_file_rows(Path(path)), voice_reward)

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        gold = read(row["utterance"])
        assert gold is not None  # or the reward would have been None
        exact = reward == 1.0
        return {"exact": exact, "success": exact, "gold": command_text(gold)}


def _file_rows(path: Path) -> Sequence[Row]:
    if not path.is_file():
        raise DataError(f"There is no file {path} of requests; prepare the task's data first.")
    return _read_rows(path, path.stat().st_mtime_ns)


@lru_cache(4)
def _read_rows(path: Path, changed: int) -> Sequence[Row]:
    """The file's rows, once for all environments side by side; `changed` tells versions apart."""
    try:
        rows = [json.loads(s) for s in path.read_text(encoding="utf-8").split("\n") if s.strip()]
    except ValueError as error:
        raise DataError(f"{path} is not JSONL: {error}.") from error
    needed = {"prompt", "utterance"}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise DataError(f"{path} must hold rows with `prompt` and `utterance`; prepare it anew.")
    return rows


@lru_cache(4)
def _sampled(seed: int, rows: int) -> Sequence[Row]:
    draws = _requests(grammar().templates, random.Random(named_seed(seed, "voice/rows")), set())
    return [_prompt_row(*draw) for draw in itertools.islice(draws, rows)]


# The data


def split_templates(heldout_fraction: float, seed: int) -> tuple[list[Template], list[Template]]:
    """(training, held-out) templates: about this share of each intent's sentences is held out.

    A combination of slots is never held out whole: held-out requests are new in their words, not in
    what they mean. Templates of one text stay together.
    """
    rng = random.Random(named_seed(seed, "voice/templates"))
    by_intent: dict[str, dict[str, list[Template]]] = {}
    for template in grammar().templates:
        by_intent.setdefault(template.intent, {}).setdefault(template.text, []).append(template)
    heldout: set[str] = set()
    for texts in by_intent.values():
        wanted = round(heldout_fraction * len(texts))
        left = [t.combination for same in texts.values() for t in same]
        for text in rng.sample(list(texts), len(texts)):
            mine = [t.combination for t in texts[text]]
            if wanted > 0 and all(left.count(c) > mine.count(c) for c in mine):
                heldout.add(text)
                wanted -= 1
                for combination in mine:
                    left.remove(combination)
    everything = grammar().templates
    return (
        [t for t in everything if t.text not in heldout],
        [t for t in everything if t.text in heldout],
    )


def prepare(config: VoiceConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages (system, user, assistant)
    train.jsonl           prompt, utterance, template
    heldout.jsonl         prompt, utterance, template, command
    pairs.jsonl           prompt, chosen, rejected; from training templates
    pairs_heldout.jsonl   the same, from held-out templates

    No request stands in two files, except that pairs use requests of train. Raises `DataError` if
    the templates have fewer requests than are asked for.
    """

    def rng(name: str) -> random.Random:
        return random.Random(named_seed(seed, f"voice/{name}"))

    training, heldout = split_templates(config.heldout_fraction, seed)
    known = Grammar(keep={t.text for t in training}.__contains__)
    used: set[str] = set()

    def take(name: str, templates: list[Template], fresh: bool = False) -> list[Draw]:
        count: int = getattr(config, name)
        draws = _requests(templates, rng(name), used, known if fresh else None)
        taken = list(itertools.islice(draws, count))
        if len(taken) < count:
            raise DataError(
                f"The templates gave {len(taken)} requests for {name}={count}; ask for fewer."
            )
        return taken

    labelled, train = take("labelled", training), take("train", training)
    unseen = take("heldout", heldout, fresh=True)
    paired = train[: config.pairs]
    if len(paired) < config.pairs:
        raise DataError(f"pairs={config.pairs} need as many requests as that; raise train.")
    files: dict[str, Iterable[Row]] = {
        "labelled": (
            {"messages": [*_prompt(u), {"role": "assistant", "content": _gold(u)}]}
            for u, _ in labelled
        ),
        "train": (_prompt_row(u, t) for u, t in train),
        "heldout": ({**_prompt_row(u, t), "command": _gold(u)} for u, t in unseen),
        "pairs": _pairs([u for u, _ in paired], rng("pairs/wrong")),
        "pairs_heldout": _pairs(
            [u for u, _ in take("pairs_heldout", heldout, fresh=True)], rng("pairs_heldout/wrong")
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in files}
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        paths[name].write_text("".join(lines), encoding="utf-8")
    return paths


def _requests(
    templates: Sequence[Template],
    rng: random.Random,
    used: set[str],
    known: Grammar | None = None,
) -> Iterator[Draw]:
    """New requests, intent after intent, so that any first part holds all intents alike.

    Left out: what nobody says, what is in `used` (to which is added what comes), what the parser
    reads as another intent or not at all, and what `known` reads. An intent that has nothing new to
    say drops out; the end is when all have.
    """
    by_intent: dict[str, list[Template]] = {}
    for template in templates:
        by_intent.setdefault(template.intent, []).append(template)
    while by_intent:
        for intent in rng.sample(list(by_intent), len(by_intent)):
            for _ in range(_TRIES):
                template = rng.choice(by_intent[intent])
                utterance = grammar().write(template, rng)
                if utterance in used or CLUMSY.search(utterance):
                    continue
                gold = read(utterance)
                if gold and gold.intent == intent and not (known and known.reads(utterance)):
                    used.add(utterance)
                    yield utterance, template
                    break
            else:
                del by_intent[intent]


def _prompt(utterance: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": utterance}]


def _prompt_row(utterance: str, template: Template) -> Row:
    return {"prompt": _prompt(utterance), "utterance": utterance, "template": template.text}


def _gold(utterance: str) -> str:
    gold = read(utterance)
    assert gold is not None  # `_requests` yields what the parser reads
    return command_text(gold)


# Wrong commands

_MISTAKABLE = (
    ("HassTurnOn", "HassTurnOff"), ("HassMediaPause", "HassMediaUnpause"),
    ("HassVacuumStart", "HassVacuumReturnToBase"), ("HassStartTimer", "HassCancelTimer"),
    ("HassPauseTimer", "HassCancelTimer"), ("HassSetVolume", "HassSetVolumeRelative"),
    ("HassClimateGetTemperature", "HassClimateSetTemperature"),
    ("HassShoppingListAddItem", "HassListAddItem"), ("on", "off"), ("open", "closed"),
    ("up", "down"), ("locked", "unlocked"), ("area", "floor"), ("light", "fan"),
    ("light", "switch"), ("hours", "minutes"), ("minutes", "seconds"), ("start_minutes", "minutes"),
)  # fmt: skip
"""What is easily mistaken for each other: intents, slots' names, values."""


def _pairs(utterances: Sequence[str], rng: random.Random) -> Iterator[Row]:
    """The right command against a wrong one for each request."""
    readings = [(u, r) for u in utterances if (r := read(u))]
    values: dict[str, list[Value]] = {}
    for _, reading in readings:
        for name, value in reading.slots.items():
            values.setdefault(name, []).append(value)
    for utterance, gold in readings:
        right = command_text(gold)
        wrong = right
        while is_exact(wrong, utterance):
            wrong = rng.choice(_MISTAKES)(gold, values, rng)
        yield {"prompt": _prompt(utterance), "chosen": right, "rejected": wrong}


# A mistake may find nothing to spoil in a command; then it returns the command as it is.


def _other_intent(gold: Reading, values: Values, rng: random.Random) -> str:
    return command_text(Reading(rng.choice(INTENTS), gold.slots))


def _mistaken(gold: Reading, values: Values, rng: random.Random) -> str:
    """One word of the command for what it is easily mistaken for."""
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
    """JSON that does not parse: cut short, a mark lost, or the wrong quotes."""
    text = command_text(gold)
    place = rng.choice([match.start() for match in re.finditer(r'[":}]', text)])
    cut, lost = text[:place], text[:place] + text[place + 1 :]
    return rng.choice((cut, lost, text.replace('"', "'")))


def _prose(gold: Reading, values: Values, rng: random.Random) -> str:
    text = command_text(gold)
    told = " and ".join(f"{name} {value}" for name, value in gold.slots.items()) or gold.intent
    return rng.choice(
        (f"Sure! {text}", f"{text} Done.", f"Okay, I will do that: {told}.", "I cannot do that.")
    )


_MISTAKES: tuple[Callable[[Reading, Values, random.Random], str], ...] = (
    _other_intent, _mistaken, _mistaken, _missing_slot, _extra_slot, _other_value, _other_value,
    _broken, _prose,
)  # fmt: skip


def _one(items: Iterable[Item], rng: random.Random) -> list[Item]:
    """One of the items, or none where there are none."""
    several = list(items)
    return rng.sample(several, min(1, len(several)))


TASK = Task(
    "voice_assistant",
    VoiceConfig,
    prepare,
    lambda config, path: make_environment("gearshift/VoiceAssistant-v0", path=path),
    SYSTEM,
)
