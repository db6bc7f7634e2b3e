"""The text environments keep Gymnasium's contract, and the collector's."""

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import gearshift.tasks.registry  # noqa: F401  (registers the tasks' environments)
from gearshift.environments.base import MAX_CHARACTERS, AnyText, RowEnvironment
from gearshift.environments.registry import make_environment
from gearshift.errors import ConfigError, DataError

ROWS = [
    {"prompt": "What is 2 + 2?", "answer": "4"},
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "3 + 3?"},
        ],
        "answer": "6",
    },
]


def right(
    prompts: Any, completions: list[str], *, answer: list[str], **_: Any
) -> list[float | None]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_any_text_holds_every_script() -> None:
    space = AnyText()
    assert "héllo 你好 🚀\n" in space and "" in space and space.sample() in space
    assert "x" * (MAX_CHARACTERS + 1) not in space and 3 not in space


@pytest.mark.parametrize("id", ["gearshift/GuessNumber-v0", "gearshift/VoiceAssistant-v0"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasiums_own_checker(id: str) -> None:
    kwargs = {"rows": 4} if "Voice" in id else {}
    check_env(gymnasium.make(id, **kwargs).unwrapped, skip_render_check=True)


def test_row_environment() -> None:
    env = RowEnvironment(ROWS, right)
    text, info = env.reset(options={"row": 1})
    assert text == "3 + 3?" and info["messages"] == ROWS[1]["prompt"] and info["row"] == 1
    assert env.step("6") == ("", 1.0, True, False, {"answer": "6", "row": 1})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("6")
    text, info = env.reset(options={"row": 0})
    assert info["messages"] == [{"role": "user", "content": "What is 2 + 2?"}]
    assert env.step("6")[1] == 0.0
    drawn = {env.reset(seed=s)[1]["row"] for s in range(8)}
    assert drawn == {0, 1}
    with pytest.raises(ConfigError, match="no row 2; its rows are 0 to 1"):
        env.reset(options={"row": 2})


@pytest.mark.parametrize("said", [None, math.nan, math.inf])
def test_a_row_without_a_reward_has_none_and_no_verdict(said: float | None) -> None:
    class Judged(RowEnvironment):
        def verdict(self, row: Any, action: str, reward: float) -> dict[str, Any]:
            return {"success": reward >= 1.0}

    env = Judged(ROWS, lambda **_: [said])
    env.reset(options={"row": 0})
    _, reward, ended, _, info = env.step("4")
    assert reward is None if said is None else math.isnan(reward)
    assert ended and "success" not in info


def play(number: int, guesses: list[str], **kwargs: Any) -> list[tuple[str, float, bool, bool]]:
    env = make_environment("gearshift/GuessNumber-v0", **kwargs)
    _, info = env.reset(options={"row": number - 1})
    assert info["row"] == number - 1 and "from 1 to" in info["messages"][-1]["content"]
    return [env.step(guess)[:4] for guess in guesses]


def test_guess_number_tells_and_pays_for_what_a_guess_learns() -> None:
    turns = play(13, ["10", "I think 15", "15", "13"])
    assert [t[0] for t in turns] == ["Higher.", "One number only.", "Lower.", ""]
    assert turns[0][1] == pytest.approx(0.5 * math.log(20 / 10) / math.log(20))
    assert turns[1][1] == 0
    assert sum(t[1] for t in turns) == pytest.approx(1)
    assert [t[2] for t in turns] == [False, False, False, True]


def test_guess_number_pays_the_same_for_one_lucky_guess() -> None:
    assert play(7, ["7"])[0][1:3] == (pytest.approx(1), True)


def test_guess_number_stops_and_repeats_pay_nothing() -> None:
    turns = play(1, ["20", "20", "20"], turns=3)
    assert turns[1][1] == turns[2][1] == 0
    assert turns[-1][2:] == (False, True)
    with pytest.raises(gymnasium.error.ResetNeeded):
        play(1, ["2", "3"], turns=1)


def test_make_environment_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean gearshift/VoiceAssistant-v0"):
        make_environment("gearshift/VoiceAssistent-v0")
    with pytest.raises(ConfigError, match="cannot be made"):
        make_environment("gearshift/GuessNumber-v0", colour="red")
    with pytest.raises(ConfigError, match="not a text environment"):
        make_environment("CartPole-v1")
    with pytest.raises(ConfigError, match="no_such_package"):
        make_environment("no_such_package:Env-v0")


def test_voice_environment_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    prompt = [{"role": "user", "content": "turn on the kitchen lights"}]
    path.write_text(json.dumps({"prompt": prompt, "utterance": prompt[0]["content"]}) + "\n")
    env = make_environment("gearshift/VoiceAssistant-v0", path=path)
    gold = '{"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}'
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(gold)
    assert (reward, terminated) == (1.0, True)
    assert info["exact"] and info["success"] and info["gold"] == gold
    assert info["utterance"] == "turn on the kitchen lights"
    env.reset(seed=0)
    _, reward, _, _, info = env.step("on it!")
    assert reward == 0.0 and not info["exact"] and info["gold"] == gold


def test_voice_environment_of_a_bad_file(tmp_path: Path) -> None:
    for name, text, said in (
        ("none.jsonl", None, "no file"),
        ("broken.jsonl", "{", "not JSON"),
        ("other.jsonl", '{"text": "a"}', "without `prompt`"),
        ("empty.jsonl", "", "has no rows"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            make_environment("gearshift/VoiceAssistant-v0", path=tmp_path / name)
