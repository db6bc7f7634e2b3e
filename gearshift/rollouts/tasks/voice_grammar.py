"""The voice assistant's language: a home's devices, Home Assistant's sentences, their parser.

A room of its own because it says what a request means (`hassil` is the parser that real homes use)
and nothing of what a model is asked to write.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from gearshift.errors import ConfigError

Value = str | int | float

INTENTS = (
    "HassTurnOn", "HassTurnOff", "HassLightSet", "HassSetPosition", "HassGetState",
    "HassClimateGetTemperature", "HassClimateSetTemperature", "HassFanSetSpeed",
    "HassSetVolume", "HassSetVolumeRelative", "HassMediaPause", "HassMediaUnpause", "HassMediaNext",
    "HassStartTimer", "HassCancelTimer", "HassPauseTimer", "HassTimerStatus",
    "HassVacuumStart", "HassVacuumReturnToBase", "HassShoppingListAddItem", "HassListAddItem",
    "HassGetWeather", "HassGetCurrentTime",
)  # fmt: skip

AREAS = (
    "kitchen", "living room", "bedroom", "master bedroom", "guest room", "kids room", "nursery",
    "bathroom", "guest bathroom", "shower room", "hallway", "entrance", "dining room", "office",
    "study", "library", "laundry room", "utility room", "pantry", "garage", "workshop", "attic",
    "cellar", "wine cellar", "conservatory", "sunroom", "porch", "patio", "terrace", "balcony",
    "garden", "backyard", "driveway", "greenhouse", "gym", "playroom", "home theater", "game room",
    "music room", "studio", "mudroom", "closet",
)  # fmt: skip
FLOORS = ("ground floor", "first floor", "top floor", "basement", "upstairs")
NAMES = {
    "light": (
        "bedside lamp", "floor lamp", "desk lamp", "reading lamp", "chandelier", "fairy lights",
        "spotlights", "ceiling", "corner", "mirror", "stairs", "shelf", "night light", "lantern",
        "lava lamp", "counter", "cabinet", "sideboard",
    ),
    "switch": (
        "coffee maker", "kettle", "toaster", "dishwasher", "christmas tree", "water pump",
        "printer", "charger", "fountain", "heated blanket", "aquarium", "router",
    ),
    "fan": ("ceiling fan", "tower fan", "desk fan", "exhaust fan", "extractor"),
    "cover": (
        "garage door", "left blind", "right blind", "roller shutter", "awning", "skylight",
        "bay window curtain", "main gate",
    ),
    "lock": ("front door", "back door", "side door", "gate lock", "bike shed"),
    "climate": ("thermostat", "heat pump", "radiator", "air conditioner", "floor heating"),
    "media_player": (
        "tv", "soundbar", "radio", "record player", "smart speaker", "projector", "jukebox",
    ),
    "vacuum": ("robot vacuum", "vacuum cleaner", "roomba", "mop robot"),
    "todo": ("groceries", "chores", "packing", "weekend", "work"),
    "scene": ("movie night", "good morning", "dinner party", "bedtime"),
    "weather": ("airport", "beach", "lake", "cottage", "ski resort"),
}  # fmt: skip
SPOKEN = {
    "timer_name": (
        "pizza", "pasta", "eggs", "tea", "laundry", "bread", "nap", "homework", "workout", "rice",
    ),
    "shopping_list_item": (
        "milk", "eggs", "bread", "butter", "apples", "olive oil", "toilet paper", "dog food",
        "coffee beans", "dish soap", "batteries", "orange juice", "rice", "tomatoes", "cheese",
    ),
    "todo_list_item": (
        "call the dentist", "water the plants", "pay the rent", "buy a gift", "clean the windows",
        "book a hotel", "fix the bike", "walk the dog", "wash the car", "return the parcel",
    ),
}  # fmt: skip
"""What people say where the grammar takes any words; such lists that are not here are left out."""
NUMBERS: dict[str, Sequence[Value]] = {
    "temperature": (*range(15, 27), 19.5, 20.5, 21.5, *range(60, 80, 2)),
    "color_temperature": range(2000, 6600, 100),
    "timer_hours": range(2, 13),
    "timer_minutes": range(2, 61),
    "timer_seconds": range(5, 61, 5),
}
PERCENTAGES = range(5, 101, 5)

CLUMSY = re.compile(
    r"""\b( (the|my|our|a|an)\ (the|my|our|an?)
    | (the|my|our|there)\ (any|some|all|each|every)
    | (lights?|lighting|lamps?)\ (lights?|lighting|lamps?) | floor\ floor
    | (close|shut|lower)\ up | (change|bring)\ (on|off|out|up|down) | turn\ (in|de)crease
    | \d+[ -](hour|minute|second)s\b.*\ timer | \d+[ -](hour|minute|second)\b(?!.*\ timer)
    | \d+-(hour|minute|second)s | an\ (?!8|11\b|18\b|hour) | a\ (8|11\b|18\b)
    )\b""",
    re.VERBOSE,
)
"""Grammatical in the templates, and yet nobody says it: "the the kitchen", "timer for 5-minute"."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a request means: an intent and its slots."""

    intent: str
    slots: Mapping[str, Value]

    def changed(self, slots: Mapping[str, Value | None]) -> Reading:
        """A copy with these slots set, or taken out where they are None."""
        merged = {**self.slots, **slots}
        return Reading(self.intent, {k: v for k, v in merged.items() if v is not None})


@dataclass(frozen=True, slots=True)
class Template:
    """One sentence template: an intent's, of the kind that fills a certain combination of slots."""

    intent: str
    combination: str
    text: str
    expression: Any
    domains: tuple[str, ...]
    """What kind of device `{name}` may be."""


class Grammar:
    """Templates, and the parser over them."""

    def __init__(self, keep: Callable[[str], bool] = lambda text: True) -> None:
        """Of the templates whose text `keep` keeps. Raises `ConfigError` without hassil."""
        try:
            import hassil
            import home_assistant_intents
            from hassil import expression
        except ImportError as error:
            raise ConfigError(
                "The voice assistant needs hassil and home-assistant-intents;"
                " pip install 'gearshift[voice]'."
            ) from error
        source: dict[str, Any] = home_assistant_intents.get_intents("en")
        lists = source["lists"]
        unspoken = [n for n, v in lists.items() if v.get("wildcard") and n not in SPOKEN]
        lists["area"] = {"values": list(AREAS)}
        lists["floor"] = {"values": list(FLOORS)}
        lists["name"] = {
            "values": [
                {"in": name, "out": name, "context": {"domain": domain}}
                for domain, names in NAMES.items()
                for name in names
            ]
        }

        def kept(block: dict[str, Any]) -> dict[str, Any]:
            """The block without the sentences that this home cannot mean."""
            needs = block.get("requires_context", {})
            possible = "area" not in needs and (
                "domain" not in needs or any(d in NAMES for d in needs["domain"])
            )
            sentences = [
                s
                for s in block["sentences"]
                if possible and keep(s) and not any(f"{{{n}" in s for n in unspoken)
            ]
            return {**block, "sentences": sentences}

        source["intents"] = {
            name: {"data": [b for b in blocks if b["sentences"]]}
            for name in INTENTS
            for blocks in [map(kept, source["intents"][name]["data"])]
        }
        self._hassil, self._tree = hassil, expression
        self._intents = hassil.Intents.from_dict(source)

    @cached_property
    def templates(self) -> list[Template]:
        """All templates, in the source's order."""
        return [
            Template(
                name,
                block.metadata["slot_combination"],
                sentence.text,
                sentence.expression,
                tuple(d for d in block.requires_context.get("domain", NAMES) if d in NAMES),
            )
            for name, intent in self._intents.intents.items()
            for block in intent.data
            for sentence in block.sentences
        ]

    def read(self, utterance: str) -> Reading | None:
        """The best reading as Home Assistant chooses it: a device's name first, then literal text.

        See `_recognize_strict` of its conversation component.
        """
        result = self._hassil.recognize_best(
            utterance, self._intents, best_slot_name="name", language="en"
        )
        if result is None:
            return None
        return Reading(
            result.intent.name,
            {name: _plain(result.entities[name].value) for name in sorted(result.entities)},
        )

    def reads(self, utterance: str) -> bool:
        """Whether any template matches."""
        return self._hassil.recognize(utterance, self._intents, language="en") is not None

    def write(self, template: Template, rng: random.Random) -> str:
        """One utterance of the template: a random walk over its tree."""
        tree = self._tree

        def walk(node: Any) -> str:
            if isinstance(node, tree.TextChunk):
                return str(node.original_text)
            if isinstance(node, tree.RuleReference):
                return walk(self._intents.expansion_rules[node.rule_name].expression)
            if isinstance(node, tree.ListReference):
                return value(node.list_name)
            if isinstance(node, tree.Alternative):
                return walk(rng.choice(node.items))
            items = list(node.items)
            if isinstance(node, tree.Permutation):
                rng.shuffle(items)
            return "".join(map(walk, items))

        def value(name: str) -> str:
            if name == "name":
                return rng.choice(NAMES[rng.choice(template.domains)])
            if name in SPOKEN:
                return rng.choice(SPOKEN[name])
            values = self._intents.slot_lists[name]
            if isinstance(values, self._hassil.intents.TextSlotList):
                return walk(rng.choice(values.values).text_in)
            return str(rng.choice(NUMBERS.get(name, PERCENTAGES)))

        return " ".join(walk(template.expression).split())


@lru_cache(1)
def grammar() -> Grammar:
    """The grammar of the whole task, which judges."""
    return Grammar()


@lru_cache(1 << 16)
def read(utterance: str) -> Reading | None:
    """What the request means, or None if the parser cannot tell."""
    return grammar().read(utterance)


def _plain(value: Any) -> Value:
    """hassil's value as it stands in JSON: text stripped, whole numbers without a point."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value if isinstance(value, int) else str(value).strip()
