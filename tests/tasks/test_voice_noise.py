"""The recogniser's noise: none at 0, as much as asked for, the same for the same seed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.tasks.voice.grammar import grammar
from gearshift.tasks.voice.homes import HOMES
from gearshift.tasks.voice.noise import (
    SOUNDS,
    hear,
    in_words,
    spoken,
    word_error_rate,
    word_errors,
)

LANGUAGES = sorted(SOUNDS)


def requests(language: str, count: int) -> list[str]:
    rng, judge = random.Random(2), grammar(language)
    return [judge.write(rng.choice(judge.templates), rng) for _ in range(count)]


def test_every_home_can_be_misheard() -> None:
    assert SOUNDS.keys() == HOMES.keys()


@given(st.text(max_size=60), st.sampled_from(LANGUAGES), st.integers(0, 1 << 30))
def test_no_noise_is_the_text_itself(text: str, language: str, seed: int) -> None:
    assert hear(text, language, 0.0, random.Random(seed)) == text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.sampled_from(LANGUAGES), st.floats(0.01, 0.5))
def test_any_text_can_be_heard(text: str, language: str, rate: float) -> None:
    heard = hear(text, language, rate, random.Random(0))
    assert heard == " ".join(heard.split())
    assert heard == hear(text, language, rate, random.Random(0))
    assert word_errors(text, text, language)[0] == 0


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_word_error_rate_is_the_setting(language: str, rate: float) -> None:
    rng = random.Random(11)
    pairs = [(text, hear(text, language, rate, rng)) for text in requests(language, 700)]
    assert word_error_rate(pairs, language) == pytest.approx(rate, rel=0.15, abs=0.006)


def test_errors_are_of_every_kind() -> None:
    rng = random.Random(0)
    heard = [hear("turn on the bedroom lights", "en", 0.3, rng) for _ in range(400)]
    assert "turn on bedroom lights" in heard  # a word lost
    assert "torn on the bedroom lights" in heard  # for another
    assert any(set(text.split()) & set(SOUNDS["en"].fillers) for text in heard)
    assert any("turnon" in text for text in heard)  # run together
    assert any(" room " in text or "bed " in text for text in heard)  # torn
    assert len(set(heard)) > 60


def test_what_is_said() -> None:
    for language, text, said in (
        ("en", "Set the Kitchen to 21%", "set the kitchen to twenty one percent"),
        ("en", "timer for 2 and 1/2 hours!", "timer for two and a half hours"),
        ("en", "heat to 21.5°", "heat to twenty one point five degrees"),
        ("de", "Küche auf 45 %", "küche auf fünfundvierzig prozent"),
        ("es", "pon 16 grados", "pon dieciséis grados"),
        ("fr", "Combien y a-t-il de lampes à l'étage", "combien y a t il de lampes à l'étage"),
    ):  # fmt: skip
        assert spoken(text, language) == said
    assert spoken("21.5 degrees, 5-minute", "en", digits=True) == "21.5 degrees 5 minute"
    assert in_words(80, "fr") == "quatre vingts"


def test_errors_are_counted_as_edits() -> None:
    assert word_errors("Turn on the 20 lights", "turn on twenty lights", "en") == (1, 5)
    assert word_errors("turn on", "uh turn off", "en") == (2, 2)
    assert word_error_rate([("a b", "a b"), ("c d", "x")], "en") == pytest.approx(0.5)
