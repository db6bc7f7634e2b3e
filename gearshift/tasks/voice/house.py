"""The home that the chat page shows: what each command of a conversation does to its devices, or
why it does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.tasks.task import TaskPanel
from gearshift.tasks.voice.answer import spoken_answer
from gearshift.tasks.voice.grammar import INTENTS
from gearshift.tasks.voice.homes import HOMES, Home
from gearshift.types import Message

State = dict[str, Any]

_START: dict[str, State] = {
    "light": {"state": "off"},
    "switch": {"state": "off"},
    "fan": {"state": "off"},
    "cover": {"state": "closed"},
    "lock": {"state": "locked"},
    "climate": {"state": "on", "temperature": 20},
    "media_player": {"state": "paused", "volume_level": 50},
    "vacuum": {"state": "docked"},
    "todo": {"items": ""},
    "scene": {"state": "off"},
    "weather": {"state": "sunny"},
    "timer": {},
}
"""The kinds of devices, and the state of each before the first command."""
_SWITCHED = {"cover": ("open", "closed"), "lock": ("locked", "unlocked")}
"""The states of a kind after HassTurnOn and HassTurnOff, where they are not `on` and `off`."""
_KINDS = {
    "Light": "light", "Position": "cover", "Climate": "climate", "Fan": "fan",
    "Volume": "media_player", "Media": "media_player", "Vacuum": "vacuum", "List": "todo",
    "Weather": "weather", "Timer": "timer",
}  # fmt: skip
"""The kind of device that an intent is for, by a word in the intent's name."""
_BECOMES = {
    "HassLightSet": "on", "HassFanSetSpeed": "on", "HassMediaPause": "paused",
    "HassMediaUnpause": "playing", "HassMediaNext": "playing", "HassVacuumStart": "cleaning",
    "HassVacuumReturnToBase": "docked", "HassPauseTimer": "paused", "HassStartTimer": "running",
}  # fmt: skip
"""The `state` of a device after an intent."""
_NEEDS = {
    "HassLightSet": ("brightness", "color", "temperature"), "HassSetPosition": ("position",),
    "HassClimateSetTemperature": ("temperature",), "HassFanSetSpeed": ("percentage",),
    "HassSetVolume": ("volume_level",), "HassSetVolumeRelative": ("volume_step",),
    "HassStartTimer": ("hours", "minutes", "seconds"), "HassListAddItem": ("item",),
    "HassShoppingListAddItem": ("item",),
}  # fmt: skip
"""The slots with the values of an intent, of which a command has one at least."""
_PERCENT = ("brightness", "position", "percentage", "volume_level")
_PLACE = ("name", "area", "floor", "domain", "device_class", "state")
_TIMES = ("hours", "minutes", "seconds")
_STEP = {"up": 10, "down": -10}


class House:
    """The devices of one language's home. A device has a place (a room, a floor, or none), a kind
    and a name (empty for what a room has of this kind).
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.devices: dict[tuple[str, str, str], State] = {
            ("", kind, name): dict(_START[kind])
            for kind, names in home.names.items()
            for name in names
        }
        self.devices |= {(area, "light", ""): dict(_START["light"]) for area in home.areas}
        self.touched: set[tuple[str, str, str]] = set()

    def apply(self, command: Mapping[str, Any]) -> None:
        """Do what a command says. Raises `DataError` if it cannot be done here."""
        intent, slots = command["intent"], {k: v for k, v in command.items() if k != "intent"}
        self.touched = set()
        self._check(intent, slots)
        kind = _kind_of(intent) or slots.get("domain")
        if intent == "HassGetCurrentTime":
            return
        found = self._find(intent, kind, slots)
        for key in found:
            if intent == "HassCancelTimer":
                del self.devices[key]
            else:
                _change(self.devices[key], intent, key[1], slots)
        self.touched = set(found)

    def _check(self, intent: str, slots: Mapping[str, Any]) -> None:
        needed = _NEEDS.get(intent, ())
        if needed and not any(name in slots for name in needed):
            raise DataError(f"{intent} needs a value for {' or '.join(needed)}.")
        starts = [f"start_{unit}" for unit in _TIMES] if _kind_of(intent) == "timer" else []
        for name, value in slots.items():
            if name not in (*_PLACE, *needed, *starts):
                raise DataError(f"{intent} has no slot `{one_line(name, 60)}`.")
            text = name in (*_PLACE, "color", "item")
            step = name == "volume_step" and value in ("up", "down")
            if not (step or (isinstance(value, str) if text else _is_number(value))):
                raise DataError(f"The value of `{name}` must be a {'text' if text else 'number'}.")
            if name in _PERCENT and not 0 <= value <= 100:
                raise DataError(f"`{name}` is {value}; it must be from 0 to 100.")
        for name, known in (("area", self.home.areas), ("floor", self.home.floors)):
            if name in slots and slots[name] not in known:
                raise DataError(f"This home has no {name} `{one_line(slots[name], 60)}`.")

    def _find(self, intent: str, kind: Any, slots: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """The devices that a command is about; a room gets a device that it does not have yet."""
        place, name = slots.get("area") or slots.get("floor") or "", slots.get("name", "")
        if kind == "timer":
            return self._timers(intent, place, name, slots)
        if intent == "HassShoppingListAddItem":
            name, key = "shopping list", ("", "todo", "shopping list")
            self.devices.setdefault(key, dict(_START["todo"]))
        if name:
            named = [key for key in self.devices if key[2] == name]
            fitting = [key for key in named if kind in (None, key[1])]
            if not fitting:
                other = f" of the kind {kind}" if named else ""
                raise DataError(f"This home has no device `{one_line(name, 60)}`{other}.")
            return fitting[:1]
        if kind == "weather":
            return []
        if kind not in _START:
            raise DataError(f"{intent} needs a `name`, or a `domain` of this home.")
        if place:
            key = (place, kind, "")
            self.devices.setdefault(key, dict(_START[kind]))
            return [key]
        return [key for key in self.devices if key[1] == kind]

    def _timers(
        self, intent: str, place: str, name: str, slots: Mapping[str, Any]
    ) -> list[tuple[str, str, str]]:
        length = " ".join(
            f"{slots[n]} {unit}" for unit in _TIMES for n in (unit, f"start_{unit}") if n in slots
        )
        if intent == "HassStartTimer":
            key = (place, "timer", name or length)
            self.devices[key] = {"state": "running", "length": length}
            return [key]
        found = [
            key
            for key, state in self.devices.items()
            if key[1] == "timer" and place in ("", key[0]) and name in ("", key[2])
            if length in ("", state["length"])
        ]
        if not found:
            raise DataError("No such timer runs here.")
        return found

    def rooms(self) -> list[dict[str, Any]]:
        """The devices by room, and those without one by kind; what the last command is about comes
        first.
        """
        rooms: dict[str, list[dict[str, Any]]] = {}
        for key in sorted(self.devices, key=lambda key: key not in self.touched):
            place, kind, name = key
            state = ", ".join(
                str(v) if k in ("state", "items", "color", "length") else f"{_LABELS.get(k, k)} {v}"
                for k, v in self.devices[key].items()
                if v != ""
            )
            device = {"name": name or kind, "state": state, "changed": key in self.touched}
            rooms.setdefault(place or kind, []).append(device)
        return [{"name": name, "devices": devices} for name, devices in rooms.items()]


_LABELS = {"volume_level": "volume", "percentage": "speed"}


def _kind_of(intent: str) -> str | None:
    return next((kind for word, kind in _KINDS.items() if word in intent), None)


def _is_number(value: Any) -> bool:
    """Whether the value is a number of a size that a home has; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _change(state: State, intent: str, kind: str, slots: Mapping[str, Any]) -> None:
    """Put the values of a command into the state of a device."""
    if intent in ("HassTurnOn", "HassTurnOff"):
        state["state"] = _SWITCHED.get(kind, ("on", "off"))[intent == "HassTurnOff"]
    elif intent in _BECOMES:
        state["state"] = _BECOMES[intent]
    elif intent == "HassSetPosition":
        state["state"] = "open" if slots["position"] else "closed"
    if "item" in slots:
        state["items"] = ", ".join(filter(None, (state["items"], slots["item"])))
    elif "volume_step" in slots:
        step = slots["volume_step"]
        level = state["volume_level"] + _STEP.get(step, step)
        state["volume_level"] = min(100, max(0, level))
    elif kind != "timer":
        state.update({name: slots[name] for name in _NEEDS.get(intent, ()) if name in slots})


def command_of(text: str) -> dict[str, Any]:
    """The command that a model wrote. Raises `DataError` if it wrote anything else."""
    try:
        command = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("This is not one JSON object, so the home does nothing.") from error
    if not isinstance(command, dict) or "intent" not in command:
        raise DataError('The command has no "intent".')
    if command["intent"] not in INTENTS:
        raise DataError(f"There is no intent `{one_line(str(command['intent']), 60)}`.")
    return command


def home_state(config: Any, run: Path, messages: Sequence[Message]) -> dict[str, Any]:
    """The home after all commands of a conversation: `rooms`, `language`, what the last command
    did as a sentence (`did`), or why it did nothing (`fault`).
    """
    houses = {language: House(HOMES[language]) for language in dict.fromkeys(config.languages)}
    language, did, fault = next(iter(houses)), "", ""
    for message in messages:
        if message["role"] != "assistant":
            continue
        did = fault = ""
        try:
            command = command_of(message["content"])
            places = [command[k] for k in ("name", "area", "floor") if k in command]
            knows = [
                n for n, h in houses.items() if places and all(p in h.home.words for p in places)
            ]
            language = next(iter(knows), language)
            houses[language].apply(command)
            did = spoken_answer(message["content"], language)
        except DataError as error:
            houses[language].touched = set()
            fault = str(error)
    return {"language": language, "rooms": houses[language].rooms(), "did": did, "fault": fault}


PANEL = TaskPanel(Path(__file__).parent / "web", home_state, single=True)
