"""The voice assistant: what requests mean, what commands earn, and what held out means."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import ConfigError, DataError
from gearshift.tasks.registry import TASKS, get_task
from gearshift.tasks.voice import requests
from gearshift.tasks.voice import task as v
from gearshift.tasks.voice.answer import spoken_answer
from gearshift.tasks.voice.commands import command_text, is_exact, score_command, voice_reward
from gearshift.tasks.voice.grammar import INTENTS, Grammar, grammar, read
from gearshift.tasks.voice.homes import HOMES
from gearshift.tasks.voice.noise import spoken
from gearshift.tasks.voice.phrases import phrases

SMALL = v.VoiceConfig(labelled=40, train=120, pairs=60, pairs_heldout=30, validation=60, test=60)
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
    assert command_text(reading) == json.dumps({"intent": intent, **slots})


def test_what_is_no_request_has_no_reading() -> None:
    assert read("tell me a joke about parrots") is None
    with pytest.raises(DataError, match="parrots"):
        score_command("{}", "tell me a joke about parrots")
    rewards = voice_reward([[], []], ["{}", "{}"], utterance=["tell me a joke", "what time is it"])
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
        assert score_command(command, request) == pytest.approx(score), change
    assert is_exact(json.dumps(dict(reversed(gold.items()))) + " \n", request)


def test_scores_fall_with_the_damage() -> None:
    request = "turn on the kitchen lights"
    ordered = [
        '{"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}',
        '{"intent": "HassTurnOn", "area": "bedroom", "domain": "light"}',
        '{"intent": "HassGetWeather"}',
        'Sure! {"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}',
    ]
    scores = [score_command(c, request) for c in ordered]
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
        assert score_command(garbage, request) == 0, garbage[:20]


@pytest.mark.parametrize("language", HOMES)
def test_homes_are_large_and_unambiguous(language: str) -> None:
    home = HOMES[language]
    names = [n for group in home.names.values() for n in group]
    assert len(home.areas) >= 30 and len(home.floors) == 5 and len(names) >= 60
    words = [*home.areas, *home.floors, *names]
    assert [w for w, count in Counter(words).items() if count > 1] == []
    assert {t.intent for t in grammar(language).templates} == set(INTENTS)


@pytest.mark.parametrize("language", HOMES)
def test_split_keeps_every_combination_in_training(language: str) -> None:
    training, heldout = requests.split_templates(0.3, 1, language)
    everything = grammar(language).templates
    assert not {t.text for t in training} & {t.text for t in heldout}
    assert len(training) + len(heldout) == len(everything)
    assert 0.2 < len(heldout) / len(everything) < 0.35
    combinations = {(t.intent, t.combination) for t in training}
    assert {(t.intent, t.combination) for t in heldout} <= combinations


@pytest.mark.parametrize("language", HOMES)
def test_held_out_templates_are_halved(language: str) -> None:
    _, heldout = requests.split_templates(0.3, 1, language)
    halves = [{t.text for t in half} for half in requests.halve_templates(heldout, 1, language)]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == {t.text for t in heldout}
    assert 0 <= len(halves[0]) - len(halves[1]) <= 1


def test_heldout_is_unseen(files: Files) -> None:
    splits = ("train", "validation", "test")
    templates = {name: {row["template"] for row in files[name]} for name in splits}
    said = {name: [row["utterance"] for row in files[name]] for name in splits}
    said["validation"] += [row["prompt"][1]["content"] for row in files["pairs_heldout"]]
    training, heldout = requests.split_templates(0.3, 3)
    readers = {"train": training}
    readers["validation"], readers["test"] = requests.halve_templates(heldout, 3)
    for name, mine in readers.items():
        known = Grammar(keep={t.text for t in mine}.__contains__)
        assert all(known.reads(u) for u in said[name])
        for other in splits:
            if other != name:
                assert not templates[name] & templates[other]
            if other not in (name, "train"):
                assert not any(known.reads(u) for u in said[other]), (name, other)


def test_files_hold_what_they_promise(files: Files) -> None:
    assert {n: len(rows) for n, rows in files.items()} == {n: getattr(SMALL, n) for n in files}
    labelled = {
        row["messages"][1]["content"]: row["messages"][2]["content"] for row in files["labelled"]
    }
    train = [r["utterance"] for r in files["train"]]
    heldout = [r["utterance"] for n in ("validation", "test") for r in files[n]]
    unseen = [r["prompt"][1]["content"] for r in files["pairs_heldout"]]
    everything = [*labelled, *train, *heldout, *unseen]
    assert len(everything) == len(set(everything))
    assert {r["prompt"][1]["content"] for r in files["pairs"]} <= set(train)
    assert {json.loads(command)["intent"] for command in labelled.values()} == set(INTENTS)
    assert all(is_exact(command, u) for u, command in labelled.items())
    for split in ("validation", "test"):
        assert all(is_exact(r["command"], r["utterance"]) for r in files[split])
    assert files["train"][0]["prompt"][0] == {"role": "system", "content": v.SYSTEM}


def test_pairs_are_right_against_wrong_in_many_ways(files: Files) -> None:
    for row in (*files["pairs"], *files["pairs_heldout"]):
        utterance = row["prompt"][1]["content"]
        assert is_exact(row["chosen"], utterance) and not is_exact(row["rejected"], utterance)
    scores = [score_command(r["rejected"], r["prompt"][1]["content"]) for r in files["pairs"]]
    assert 0 in scores and len({round(s, 3) for s in scores}) >= 6


def test_prepare_depends_on_the_seed_alone(tmp_path: Path) -> None:
    few = v.VoiceConfig(labelled=6, train=10, pairs=6, pairs_heldout=4, validation=6, test=6)
    texts = [
        {n: p.read_bytes() for n, p in v.prepare(few, seed, tmp_path / folder).items()}
        for seed, folder in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert texts[0] == texts[1]
    assert all(texts[0][name] != texts[2][name] for name in texts[0])


def test_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise train"):
        v.prepare(v.VoiceConfig(labelled=1, train=2, validation=1, pairs=3), 0, tmp_path)


def test_an_exhausted_intent_drops_out() -> None:
    times = [t for t in grammar().templates if t.intent == "HassGetCurrentTime"]
    drawn = list(requests.new_requests(times, random.Random(0), set()))
    assert 1 < len(drawn) < 40 and "what time is it" in {u for u, _ in drawn}


def test_tasks_by_name() -> None:
    task = get_task("voice_assistant")
    assert task is TASKS["voice_assistant"] and task.config().name == task.name  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean voice_assistant"):
        get_task("voice_asistant")


# Several languages, and a recogniser between


MANY = v.VoiceConfig(
    labelled=48, train=96, pairs=16, pairs_heldout=8, validation=64, test=32,
    languages=("en", "de", "es", "fr"), noise=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Files]:
    paths = v.prepare(MANY, 5, tmp_path_factory.mktemp("voices"))
    return paths, load(paths)


FOREIGN: list[tuple[str, str, str, dict[str, Any]]] = [
    ("de", "schalte das Licht in der Küche ein", "HassTurnOn",
     {"area": "Küche", "domain": "light"}),
    ("de", "stelle einen Timer auf 10 Minuten", "HassStartTimer", {"minutes": 10}),
    ("es", "apaga la cafetera", "HassTurnOff", {"name": "cafetera"}),
    ("es", "añade leche a la lista de la compra", "HassShoppingListAddItem", {"item": "leche"}),
    ("fr", "allume la lumière dans le salon", "HassTurnOn", {"area": "salon", "domain": "light"}),
    ("fr", "mets la télé en pause", "HassMediaPause", {"name": "télé"}),
]  # fmt: skip


@pytest.mark.parametrize(("language", "utterance", "intent", "slots"), FOREIGN)
def test_readings_in_other_languages(
    language: str, utterance: str, intent: str, slots: dict[str, Any]
) -> None:
    reading = read(utterance, language)
    assert reading is not None
    assert command_text(reading) == json.dumps({"intent": intent, **slots}, ensure_ascii=False)
    assert read(utterance) is None  # no English


def test_nouns_go_with_their_articles() -> None:
    for language, wrong, right in (
        ("de", "im Küche", "in der Küche"), ("de", "die der Küche", "der Küche"),
        ("es", "el cocina", "la cocina"), ("fr", "l'cuisine", "la cuisine"),
        ("fr", "le entrée", "l'entrée"),
    ):  # fmt: skip
        assert HOMES[language].clumsy.search(wrong), wrong
        assert not HOMES[language].clumsy.search(right), right


def test_languages_take_equal_parts_and_read_back(many: tuple[dict[str, Path], Files]) -> None:
    _, files = many
    for name in ("train", "validation", "test"):
        assert set(Counter(row["language"] for row in files[name]).values()) == {
            getattr(MANY, name) // 4
        }
    assert all(
        score_command(row["command"], row["utterance"], row["language"]) == 1.0
        for row in files["validation"]
    )
    assert all(row["prompt"][0]["content"] == v.SYSTEM for row in files["validation"])


def test_heldout_is_unseen_in_every_language(many: tuple[dict[str, Path], Files]) -> None:
    _, files = many
    for language in MANY.languages:
        training, heldout = requests.split_templates(0.3, 5, language)
        halves = requests.halve_templates(heldout, 5, language)
        for split, others in (("validation", halves[1]), ("test", halves[0])):
            known = Grammar({t.text for t in (*training, *others)}.__contains__, language)
            rows = [row for row in files[split] if row["language"] == language]
            assert rows and not any(known.reads(row["utterance"]) for row in rows)


def test_half_of_the_heldout_is_heard_through_noise(many: tuple[dict[str, Path], Files]) -> None:
    _, files = many
    counts = Counter((row["language"], row["noisy"]) for row in files["validation"])
    assert set(counts.values()) == {8} and len(counts) == 8
    texts = [
        (row["noisy"], row["prompt"][1]["content"], row["utterance"]) for row in files["validation"]
    ]
    assert all(heard == said for noisy, heard, said in texts if not noisy)
    assert sum(heard != said for noisy, heard, said in texts if noisy) > 16
    assert all(heard == heard.lower() for noisy, heard, _ in texts if noisy)
    # Labels and wrong commands are heard alike; their commands are those of what was said.
    labels = [row["messages"][1]["content"] for row in files["labelled"]]
    assert 15 < sum(text == text.lower() for text in labels) < 48
    assert all("intent" in json.loads(row["messages"][2]["content"]) for row in files["labelled"])


def test_training_hears_anew_and_is_judged_by_what_was_said(
    many: tuple[dict[str, Path], Files],
) -> None:
    paths, _ = many
    train = v.TASK.make(MANY, paths["train"])
    heard = {train.reset(seed=seed, options={"row": 1})[0] for seed in range(24)}
    assert len(heard) > 4
    again = [train.reset(seed=9, options={"row": 1})[0] for _ in range(3)]
    assert len(set(again)) == 1
    text, info = train.reset(seed=9, options={"row": 1})
    assert info["messages"][-1]["content"] == text
    _, _, _, _, verdict = train.step("{}")
    _, reward, *_ = [train.reset(seed=3, options={"row": 1}), train.step(verdict["gold"])][1]
    assert reward == 1.0


def test_figures_of_clean_noisy_and_each_language(many: tuple[dict[str, Path], Files]) -> None:
    paths, files = many
    environment = v.TASK.make(MANY, paths["validation"])
    samples = []
    for i, row in enumerate(files["validation"]):
        text, _ = environment.reset(seed=i, options={"row": i})
        assert text == row["prompt"][1]["content"]  # no more noise than was written
        # A policy that knows all but German, and fails where there is noise.
        right = row["language"] != "de" and not row["noisy"]
        *_, info = environment.step(row["command"] if right else "{}")
        samples.append({"metrics": info["metrics"]})
    assert v.TASK.corpus is not None
    assert v.TASK.corpus(samples) == {
        "success_clean": 0.75, "success_noisy": 0.0, "success_de": 0.0,
        "success_en": 0.5, "success_es": 0.5, "success_fr": 0.5,
    }  # fmt: skip


def test_english_alone_is_written_as_ever(files: Files) -> None:
    """The keys that older runs have, and no others."""
    assert set(files["validation"][0]) == {"prompt", "utterance", "template", "command"}
    assert all(row["prompt"][1]["content"] == row["utterance"] for row in files["validation"])


# Answers


@pytest.mark.parametrize("language", HOMES)
def test_every_command_is_said_back(language: str) -> None:
    said = {}
    for intent in INTENTS:
        templates = [t for t in grammar(language).templates if t.intent == intent]
        utterance, _ = next(requests.new_requests(templates, random.Random(4), set()))
        gold = read(utterance, language)
        assert gold is not None
        answer = said[intent] = spoken_answer(command_text(gold), language)
        named = [gold.slots[k] for k in ("name", "area", "floor", "item") if k in gold.slots]
        assert all(str(n) in answer for n in named), (utterance, answer)
        assert answer.endswith(".") and "{" not in answer and spoken(answer, language)
    assert len({answer.split(":")[0] for answer in said.values()}) > len(INTENTS) - 4


def test_answers_in_words() -> None:
    for language, command, answer in (
        ("en", {"intent": "HassTurnOn", "area": "kitchen", "domain": "light"},
         "Turning on the kitchen light."),
        ("en", {"intent": "HassClimateSetTemperature", "name": "thermostat", "temperature": 21.5},
         "Setting the thermostat to 21.5 degrees."),
        ("en", {"intent": "HassStartTimer", "hours": 2, "minutes": 30, "name": "pizza"},
         "Starting a timer: pizza, 2 hours and 30 minutes."),
        ("de", {"intent": "HassGetState", "domain": "light", "area": "Küche", "state": "on"},
         "Ich sehe nach: Licht, Küche, angeschaltet."),
        ("fr", {"intent": "HassSetVolumeRelative", "name": "télé", "volume_step": "down"},
         "Je change le volume : télé, moins."),
    ):  # fmt: skip
        assert spoken_answer(json.dumps(command), language) == answer


@pytest.mark.parametrize(
    "text", ["", "on", "[1]", "null", '{"intent": ["x"]}', '{"intent": "No"}', "[" * 100_000]
)
def test_what_is_no_command_gets_an_apology(text: str) -> None:
    assert spoken_answer(text) == "Sorry, I did not understand that."


def test_phrases_are_the_runs_training_requests(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [
        {"prompt": [], "utterance": "turn it on"},
        {"prompt": [], "utterance": "mach an", "language": "de"},
    ]
    train = tmp_path / "data" / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = phrases(tmp_path)
    assert found[0] == "turn it on" and "mach an" not in found and "kitchen" in found
    train.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ConfigError, match="English only"):
        phrases(tmp_path)
    with pytest.raises(DataError, match="run of the voice assistant"):
        phrases(tmp_path / "nowhere")
