"""The voice assistant's languages: Home Assistant's sentences, and their parser.

Real homes use the same parser, `hassil`: a request means what the parser reads in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from gearshift.errors import ConfigError
from gearshift.tasks.voice.homes import HOMES, NUMBERS, PERCENTAGES, Value

INTENTS = (
    "HassTurnOn", "HassTurnOff", "HassLightSet", "HassSetPosition", "HassGetState",
    "HassClimateGetTemperature", "HassClimateSetTemperature", "HassFanSetSpeed",
    "HassSetVolume", "HassSetVolumeRelative", "HassMediaPause", "HassMediaUnpause", "HassMediaNext",
    "HassStartTimer", "HassCancelTimer", "HassPauseTimer", "HassTimerStatus",
    "HassVacuumStart", "HassVacuumReturnToBase", "HassShoppingListAddItem", "HassListAddItem",
    "HassGetWeather", "HassGetCurrentTime",
)  # fmt: skip


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
    """One sentence template of an intent. It fills a certain combination of slots."""

    intent: str
    combination: str
    text: str
    expression: Any
    domains: tuple[str, ...]
    """The kind of device that `{name}` may be."""
    language: str


class Grammar:
    """Templates of one language, and the parser over them."""

    def __init__(
        self, keep: Callable[[str], bool] = lambda text: True, language: str = "en"
    ) -> None:
        """Use the templates whose text `keep` accepts. Raises `ConfigError` without hassil."""
        try:
            import hassil
            import home_assistant_intents
            from hassil import expression
        except ImportError as error:
            raise ConfigError(
                "The voice assistant needs hassil and home-assistant-intents;"
                " pip install 'gearshift[voice]'."
            ) from error
        source: dict[str, Any] = home_assistant_intents.get_intents(language)
        home = HOMES[language]
        lists = source["lists"]
        unspoken = [n for n, v in lists.items() if v.get("wildcard") and n not in home.spoken]
        lists["area"] = {"values": list(home.areas)}
        lists["floor"] = {"values": list(home.floors)}
        lists["name"] = {
            "values": [
                {"in": name, "out": name, "context": {"domain": domain}}
                for domain, names in home.names.items()
                for name in names
            ]
        }

        def kept(block: dict[str, Any]) -> dict[str, Any]:
            """The block without the sentences that have no meaning in this home."""
            needs = block.get("requires_context", {})
            possible = "area" not in needs and (
                "domain" not in needs or any(d in home.names for d in needs["domain"])
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
        self.language, self.home = language, home
        self._hassil, self._tree = hassil, expression
        self._intents = hassil.Intents.from_dict(source)

    @cached_property
    def templates(self) -> list[Template]:
        """All templates, in the source's order."""
        names = self.home.names
        return [
            Template(
                name,
                block.metadata["slot_combination"],
                sentence.text,
                sentence.expression,
                tuple(d for d in block.requires_context.get("domain", names) if d in names),
                self.language,
            )
            for name, intent in self._intents.intents.items()
            for block in intent.data
            for sentence in block.sentences
        ]

    def read(self, utterance: str) -> Reading | None:
        """The reading that Home Assistant would choose: a device's name first, then literal text.

        See `_recognize_strict` of its conversation component.
        """
        result = self._hassil.recognize_best(
            utterance, self._intents, best_slot_name="name", language=self.language
        )
        if result is None:
            return None
        return Reading(
            result.intent.name,
            {name: _plain(result.entities[name].value) for name in sorted(result.entities)},
        )

    def reads(self, utterance: str) -> bool:
        """Whether any template matches."""
        found = self._hassil.recognize(utterance, self._intents, language=self.language)
        return found is not None

    def word(self, list_name: str, value: Value) -> str | None:
        """The first word of the list that means the value, if there is one."""
        values = getattr(self._intents.slot_lists.get(list_name), "values", ())
        for entry in values:
            if entry.value_out == value:
                return " ".join(_first(entry.text_in, self._tree).split())
        return None

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
                return rng.choice(self.home.names[rng.choice(template.domains)])
            if name in self.home.spoken:
                return rng.choice(self.home.spoken[name])
            values = self._intents.slot_lists[name]
            if isinstance(values, self._hassil.intents.TextSlotList):
                return walk(rng.choice(values.values).text_in)
            return str(rng.choice(NUMBERS.get(name, PERCENTAGES)))

        return " ".join(walk(template.expression).split())


def _first(node: Any, tree: Any) -> str:
    """The text of the node if each choice takes its first option."""
    if isinstance(node, tree.TextChunk):
        return str(node.original_text)
    items = getattr(node, "items", ())
    if isinstance(node, tree.Alternative):
        return _first(items[0], tree) if items else ""
    return "".join(_first(item, tree) for item in items)


@lru_cache(len(HOMES))
def grammar(language: str = "en") -> Grammar:
    """The grammar of the whole task in this language. It decides which commands are right."""
    return Grammar(language=language)


@lru_cache(1 << 16)
def read(utterance: str, language: str = "en") -> Reading | None:
    """What the request means, or None if the parser cannot tell."""
    return grammar(language).read(utterance)


def _plain(value: Any) -> Value:
    """hassil's value in the form that JSON has: stripped text, whole numbers without a point."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value if isinstance(value, int) else str(value).strip()
