"""The voice assistant: what requests mean, what commands earn, and what held out means."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.tasks import TASKS, get_task
from gearshift.rollouts.tasks import voice as v
from gearshift.rollouts.tasks.voice_grammar import (
    AREAS,
    FLOORS,
    INTENTS,
    NAMES,
    Grammar,
    grammar,
    read,
)

SMALL = v.VoiceConfig(labelled=40, train=120, pairs=60, pairs_heldout=30, heldout=60)
Files = dict[str, list[dict[str, Any]]]


def load(paths: dict[str, Path]) -> Files:
    return {n: [json.loads(s) for s in p.read_text().splitlines()] for n, p in paths.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return load(v.prepare(SMALL, 3, tmp_path_factory.mktemp("voice")))


READINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("turn on the kitchen lights", "HassTurnOn", {"area": "kitchen", "domain": "light"}),
    ("switch off the coffee maker", "HassTurnOff", {"name": "coffee maker"}),
    ("please close the left blind", "HassTurnOff", {"name": "left blind"}),
    # The door by its name, not the doors of the area "garage".
    ("raise the garage door to 50", "HassSetPosition", {"name": "garage door", "position": 50}),
    (
        "set the bedroom brightness to 50%",
        "HassLightSet",
        {"area": "bedroom", "brightness": 50, "domain": "light"},
    ),
    (
        "set the thermostat to 21.5 degrees",
        "HassClimateSetTemperature",
        {"name": "thermostat", "temperature": 21.5},
    ),
    ("set a timer for 2 hours and 30 minutes", "HassStartTimer", {"hours": 2, "minutes": 30}),
    ("set a 10 minute timer for pizza", "HassStartTimer", {"minutes": 10, "name": "pizza"}),
    ("cancel the pasta timer", "HassCancelTimer", {"name": "pasta"}),
    ("add olive oil to my shopping list", "HassShoppingListAddItem", {"item": "olive oil"}),
    (
        "add pay the rent to my chores list",
        "HassListAddItem",
        {"item": "pay the rent", "name": "chores"},
    ),
    (
        "turn the volume down in the office by 20 percent",
        "HassSetVolumeRelative",
        {"area": "office", "volume_step": -20},
    ),
    (
        "are any lights on in the garage",
        "HassGetState",
        {"area": "garage", "domain": "light", "state": "on"},
    ),
    ("what time is it", "HassGetCurrentTime", {}),
    ("pause the tv", "HassMediaPause", {"name": "tv"}),
]


@pytest.mark.parametrize(("utterance", "intent", "slots"), READINGS)
def test_readings(utterance: str, intent: str, slots: dict[str, Any]) -> None:
    reading = read(utterance)
    assert reading is not None
    # Key order and number format are part of the canonical form, so the texts are compared.
    assert v.command_text(reading) == json.dumps({"intent": intent, **slots})


def test_what_is_no_request_has_no_reading() -> None:
    assert read("tell me a joke about parrots") is None
    with pytest.raises(DataError, match="parrots"):
        v.score_command("{}", "tell me a joke about parrots")
    rewards = v.voice_reward(
        [[], []], ["{}", "{}"], utterance=["tell me a joke", "what time is it"]
    )
    assert rewards == [None, pytest.approx(0.1)]


def test_scores_by_hand() -> None:
    request = "set the kitchen brightness to 1"
    gold = {"intent": "HassLightSet", "area": "kitchen", "brightness": 1, "domain": "light"}
    for change, score in (
        ({}, 1.0),
        ({"brightness": 1.0}, 1.0),
        ({"brightness": 50}, 0.1 + 0.3 + 0.4 * 2 / 3),
        ({"brightness": "1"}, 0.1 + 0.3 + 0.4 * 2 / 3),
        ({"brightness": True}, 0.1 + 0.3 + 0.4 * 2 / 3),
        ({"floor": "basement"}, 0.1 + 0.3 + 0.4 * 3 / 4),
        ({"intent": "HassTurnOn"}, 0.1 + 0.4),
        ({"intent": ["HassLightSet"], "area": {}, "brightness": [], "domain": None}, 0.1),
    ):
        command = json.dumps({**gold, **change})
        assert v.score_command(command, request) == pytest.approx(score), change
    assert v.is_exact(json.dumps(dict(reversed(gold.items()))) + " \n", request)


def test_scores_fall_with_the_damage() -> None:
    request = "turn on the kitchen lights"
    ordered = [
        '{"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}',
        '{"intent": "HassTurnOn", "area": "bedroom", "domain": "light"}',
        '{"intent": "HassGetWeather"}',
        'Sure! {"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}',
    ]
    scores = [v.score_command(c, request) for c in ordered]
    assert scores == sorted(set(scores), reverse=True) and scores[0] == 1 and scores[-1] == 0
    for garbage in (
        "",
        "on",
        "[1]",
        '{"intent": ',
        "[" * 100_000,
        ordered[0] + "}",
        ordered[0] * 2,
    ):
        assert v.score_command(garbage, request) == 0, garbage[:20]


def test_the_home_is_large_and_unambiguous() -> None:
    names = [n for group in NAMES.values() for n in group]
    assert len(AREAS) >= 30 and len(FLOORS) == 5 and len(names) >= 60
    words = [*AREAS, *FLOORS, *names]
    assert [w for w, count in Counter(words).items() if count > 1] == []
    assert {t.intent for t in grammar().templates} == set(INTENTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_split_keeps_every_combination_in_training(seed: int) -> None:
    training, heldout = v.split_templates(0.3, seed)
    assert not {t.text for t in training} & {t.text for t in heldout}
    assert len(training) + len(heldout) == len(grammar().templates)
    assert 0.25 < len(heldout) / len(grammar().templates) < 0.35
    combinations = {(t.intent, t.combination) for t in training}
    assert {(t.intent, t.combination) for t in heldout} <= combinations


def test_heldout_is_unseen(files: Files) -> None:
    heldout = {row["template"] for row in files["heldout"]}
    training = {row["template"] for row in files["train"]}
    assert not heldout & training
    known = Grammar(keep={t.text for t in v.split_templates(0.3, 3)[0]}.__contains__)
    unseen = [row["utterance"] for row in files["heldout"]]
    unseen += [row["prompt"][1]["content"] for row in files["pairs_heldout"]]
    assert not any(known.reads(u) for u in unseen)
    assert all(known.reads(row["utterance"]) for row in files["train"])


def test_files_hold_what_they_promise(files: Files) -> None:
    assert {n: len(rows) for n, rows in files.items()} == {n: getattr(SMALL, n) for n in files}
    labelled = {
        row["messages"][1]["content"]: row["messages"][2]["content"] for row in files["labelled"]
    }
    train, heldout = ([r["utterance"] for r in files[n]] for n in ("train", "heldout"))
    unseen = [r["prompt"][1]["content"] for r in files["pairs_heldout"]]
    everything = [*labelled, *train, *heldout, *unseen]
    assert len(everything) == len(set(everything))
    assert {r["prompt"][1]["content"] for r in files["pairs"]} <= set(train)
    assert {json.loads(command)["intent"] for command in labelled.values()} == set(INTENTS)
    assert all(v.is_exact(command, u) for u, command in labelled.items())
    assert all(v.is_exact(r["command"], r["utterance"]) for r in files["heldout"])
    assert files["train"][0]["prompt"][0] == {"role": "system", "content": v.SYSTEM}


def test_pairs_are_right_against_wrong_in_many_ways(files: Files) -> None:
    for row in (*files["pairs"], *files["pairs_heldout"]):
        utterance = row["prompt"][1]["content"]
        assert v.is_exact(row["chosen"], utterance) and not v.is_exact(row["rejected"], utterance)
    scores = [v.score_command(r["rejected"], r["prompt"][1]["content"]) for r in files["pairs"]]
    assert 0 in scores and len({round(s, 3) for s in scores}) >= 6


def test_prepare_depends_on_the_seed_alone(tmp_path: Path) -> None:
    few = v.VoiceConfig(labelled=6, train=10, pairs=6, pairs_heldout=4, heldout=6)
    texts = [
        {n: p.read_bytes() for n, p in v.prepare(few, seed, tmp_path / folder).items()}
        for seed, folder in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert texts[0] == texts[1]
    assert all(texts[0][name] != texts[2][name] for name in texts[0])


def test_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise train"):
        v.prepare(v.VoiceConfig(labelled=1, train=2, heldout=1, pairs=3), 0, tmp_path)


def test_an_exhausted_intent_drops_out() -> None:
    times = [t for t in grammar().templates if t.intent == "HassGetCurrentTime"]
    drawn = list(v._requests(times, random.Random(0), set()))
    assert 1 < len(drawn) < 40 and "what time is it" in {u for u, _ in drawn}


def test_tasks_by_name() -> None:
    task = get_task("voice_assistant")
    assert task is TASKS["voice_assistant"] and task.config().name == task.name  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean voice_assistant"):
        get_task("voice_asistant")
