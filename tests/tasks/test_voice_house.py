"""The home beside the chat: commands change its devices, and wrong ones say why they do not."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gearshift.tasks.voice.commands import command_text
from gearshift.tasks.voice.house import home_state


def after(*commands: str, languages: tuple[str, ...] = ("en",)) -> dict[str, Any]:
    messages = [{"role": "assistant", "content": text} for text in commands]
    config = SimpleNamespace(languages=languages)
    return home_state(config, Path(), [{"role": "user", "content": "a request"}, *messages])


def state(home: dict[str, Any], room: str, device: str) -> str:
    [devices] = [r["devices"] for r in home["rooms"] if r["name"] == room]
    return str(next(d["state"] for d in devices if d["name"] == device))


def changed(home: dict[str, Any]) -> list[str]:
    return [d["name"] for room in home["rooms"] for d in room["devices"] if d["changed"]]


@pytest.mark.parametrize(
    ("commands", "room", "device", "expected"),
    [
        (['"HassTurnOn", "area": "attic", "domain": "light"'], "attic", "light", "on"),
        (['"HassTurnOn", "name": "awning"'], "cover", "awning", "open"),
        (['"HassTurnOff", "name": "front door"'], "lock", "front door", "unlocked"),
        (['"HassSetPosition", "name": "awning", "position": 0'], "cover", "awning",
         "closed, position 0"),
        (['"HassSetVolume", "name": "tv", "volume_level": 90',
          '"HassSetVolumeRelative", "name": "tv", "volume_step": 25'], "media_player", "tv",
         "paused, volume 100"),
        (['"HassSetVolumeRelative", "name": "tv", "volume_step": "down"'], "media_player", "tv",
         "paused, volume 40"),
        (['"HassShoppingListAddItem", "item": "milk"',
          '"HassShoppingListAddItem", "item": "rice"'], "todo", "shopping list", "milk, rice"),
        (['"HassStartTimer", "minutes": 5, "name": "tea"', '"HassPauseTimer", "name": "tea"'],
         "timer", "tea", "paused, 5 minutes"),
        (['"HassClimateSetTemperature", "floor": "upstairs", "temperature": 21.5'], "upstairs",
         "climate", "on, temperature 21.5"),
    ],
)  # fmt: skip
def test_commands_change_devices(
    commands: list[str], room: str, device: str, expected: str
) -> None:
    home = after(*(f'{{"intent": {command}}}' for command in commands))
    assert state(home, room, device) == expected and not home["fault"] and home["did"]
    assert changed(home) == [device] and home["rooms"][0]["name"] == room


def test_all_lights_go_out_at_once_and_a_question_changes_nothing() -> None:
    on = '{"intent": "HassTurnOn", "area": "attic", "domain": "light"}'
    home = after(on, '{"intent": "HassTurnOff", "domain": "light"}')
    assert state(home, "attic", "light") == "off" and len(changed(home)) > 40
    asked = after(on, '{"intent": "HassGetState", "area": "attic", "domain": "light"}')
    assert state(asked, "attic", "light") == "on"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Sure!", "not one JSON object"),
        ("[" * 100_000, "not one JSON object"),
        ("[1]", 'no "intent"'),
        ('{"intent": "HassFly"}', "no intent `HassFly`"),
        ('{"intent": ["HassTurnOn"]}', "no intent"),
        ('{"intent": "HassTurnOn"}', "needs a `name`"),
        ('{"intent": "HassTurnOn", "domain": "rocket"}', "needs a `name`"),
        ('{"intent": "HassTurnOn", "domain": ["light"]}', "`domain` must be a text"),
        ('{"intent": "HassTurnOn", "name": "moon"}', "no device `moon`"),
        ('{"intent": "HassLightSet", "name": "tv", "color": "red"}', "of the kind light"),
        ('{"intent": "HassTurnOn", "area": "moon", "domain": "light"}', "no area `moon`"),
        ('{"intent": "HassTurnOn", "name": "tv", "speed": 1}', "no slot `speed`"),
        ('{"intent": "HassLightSet", "name": "shelf"}', "needs a value for brightness"),
        ('{"intent": "HassLightSet", "name": "shelf", "brightness": 101}', "from 0 to 100"),
        ('{"intent": "HassLightSet", "name": "shelf", "brightness": true}', "must be a number"),
        ('{"intent": "HassLightSet", "name": "shelf", "brightness": "up"}', "must be a number"),
        ('{"intent": "HassLightSet", "name": "shelf", "temperature": NaN}', "must be a number"),
        ('{"intent": "HassCancelTimer"}', "No such timer"),
    ],
)
def test_wrong_commands_do_nothing_and_say_why(text: str, fault: str) -> None:
    home = after(text)
    assert fault in home["fault"] and not home["did"] and not changed(home)
    assert {**home, "fault": ""} == after()


def test_the_home_of_the_language_is_shown() -> None:
    command = '{"intent": "HassTurnOn", "area": "Küche", "domain": "light"}'
    home = after(command, languages=("en", "de"))
    assert home["language"] == "de" and changed(home) == ["light"]
    assert home["did"].startswith("Wird eingeschaltet")


def test_what_the_parser_reads_can_be_done() -> None:
    """Each right command does something here, except for a timer that does not run."""
    pytest.importorskip("hassil")
    from gearshift.tasks.voice.grammar import grammar, read
    from gearshift.tasks.voice.requests import new_requests

    draws = new_requests(grammar().templates, random.Random(0), set())
    for utterance, _ in itertools.islice(draws, 120):
        reading = read(utterance)
        assert reading
        assert after(command_text(reading))["fault"] in ("", "No such timer runs here."), utterance
