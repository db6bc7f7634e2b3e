"""Gymnasium's games played in words are the same games; and the task that plays any environment."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.engine import Engine
from gearshift.environments.gym_games import GymInWords
from gearshift.environments.registry import make_environment
from gearshift.errors import ConfigError, DataError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.evaluate import evaluate, starts_of
from gearshift.tasks import gym as t
from gearshift.trainers.rl.config import RLConfig
from tests.gyms import SayLetters
from tests.trainers.rl_runs import trainer
from tests.zoo import random_model


def newest(name: str) -> str:
    return max(id for id in gymnasium.registry if id.startswith(f"{name}-v"))


LAKE, CLIFF, TAXI, BLACKJACK = map(newest, ("FrozenLake", "CliffWalking", "Taxi", "Blackjack"))
STANDS = {"red": (0, 0), "green": (0, 4), "yellow": (4, 0), "blue": (4, 3)}
MOVES = {
    LAKE: ("left", "down", "right", "up"),
    CLIFF: ("up", "right", "down", "left"),
    TAXI: ("south", "north", "east", "west", "pickup", "dropoff"),
    BLACKJACK: ("stick", "hit"),
}
DRY = {"is_slippery": False}
bare = cache(gymnasium.make)  # Taxi's table takes a while
in_words = cache(GymInWords)


def understood(game: str, text: str) -> Any:
    """The game's own observation, out of the text."""
    last = text.splitlines()[-1]
    numbers = [int(n) for n in re.findall(r"\d+", last)]
    if game == BLACKJACK:
        return (*numbers, int("a usable ace" in last))
    if game != TAXI:
        return numbers[0] * {LAKE: 4, CLIFF: 12}[game] + numbers[1]
    from_, to = re.fullmatch(r".*passenger (.*), destination (\w+) .*", last).groups()  # type: ignore[union-attr]
    places = [f"at {name} ({r},{c})" for name, (r, c) in STANDS.items()] + ["in the taxi"]
    at = (*numbers[:2], places.index(from_), list(STANDS).index(to))
    return bare(TAXI).unwrapped.encode(*at)  # type: ignore[attr-defined]


def won(game: str, reward: SupportsFloat, ended: bool) -> bool:
    """By the reward that only a won game ends with."""
    return ended and reward == {LAKE: 1, CLIFF: -1, TAXI: 20, BLACKJACK: 1}[game]


@pytest.mark.parametrize("game", MOVES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), moves=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_turn_by_turn_it_is_the_bare_game(game: str, seed: int, moves: list[int]) -> None:
    numbers, words = bare(game), in_words(game)
    seen, _ = numbers.reset(seed=seed)
    text, info = words.reset(seed=seed)
    assert info["messages"] == [{"role": "user", "content": text}]
    for move in moves:
        assert understood(game, text) == seen
        move %= len(MOVES[game])
        seen, reward, ended, cut, _ = numbers.step(move)
        text, *rest, info = words.step(f" {MOVES[game][move].title()}.\n")
        assert rest == [reward, ended, cut]
        if ended or cut:
            assert info["success"] == won(game, reward, ended)
            break
        assert info == {}


def shortest(game: str, table: dict[int, Any], start: int) -> list[int]:
    """The moves to the nearest won end."""
    ways: dict[int, list[int]] = {start: []}
    for state in (queue := [start]):
        for move, [(_, after, reward, ended)] in table[state].items():
            way = [*ways[state], move]
            if won(game, reward, ended):
                return way
            if after not in ways and not ended:
                ways[after] = way
                queue.append(after)
    raise AssertionError("no way")


@pytest.mark.parametrize("game", [LAKE, CLIFF, TAXI])
def test_who_knows_the_way_wins(game: str) -> None:
    words = GymInWords(game, DRY) if game == LAKE else in_words(game)
    text, _ = words.reset(seed=5)
    way = shortest(game, words.game.unwrapped.P, understood(game, text))  # type: ignore[attr-defined]
    *_, (_, _, ended, cut, info) = [words.step(MOVES[game][move]) for move in way]
    assert (ended, cut, info["success"]) == (True, False, True)
    assert info["metrics"] == {"turns": len(way), "unreadable": 0}
    with pytest.raises(gymnasium.error.ResetNeeded):
        words.step(MOVES[game][0])


@pytest.mark.parametrize("game", MOVES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasiums_own_checker(game: str) -> None:
    check_env(in_words(game), skip_render_check=True)


@pytest.mark.parametrize(
    "answer", ["", "jump", "left or right", "not-down", "rightly", "lef", "-left", "2"]
)
def test_an_unreadable_answer_costs_a_turn_and_moves_nothing(answer: str) -> None:
    env = GymInWords(LAKE, DRY, penalty=0.25)
    text, _ = env.reset(seed=0)
    here = text.splitlines()[-1]
    again = f"Answer with one word: left, down, right or up.\n{here}"
    assert env.step(answer) == (again, -0.25, False, False, {})
    # The game has not moved: two steps down and it is two rows below its start.
    env.step("DOWN")
    assert env.step("I go down, down!")[0] == "You are at row 2, column 0."


def test_the_turn_limit_counts_unreadable_answers() -> None:
    env = GymInWords(LAKE, DRY, turns=3)
    env.reset(seed=0)
    for answer in ("down", "what?"):
        assert env.step(answer)[2:] == (False, False, {})
    metrics = {"turns": 3, "unreadable": 1}
    assert env.step("down")[2:] == (False, True, {"metrics": metrics, "success": False})
    env.reset(seed=0)
    assert env.step("down")[3] is False, "and begins anew"


def test_a_game_that_ends_in_the_last_turn_is_not_cut() -> None:
    env = GymInWords(LAKE, {**DRY, "desc": ["SG", "FF"]}, turns=1)
    env.reset(seed=0)
    assert env.step("right")[1:4] == (1.0, True, False)


class Counter(gymnasium.Env[int, int]):
    """A game that nobody has words for: each move is worth itself, from -1 to 1."""

    observation_space = spaces.Dict({"a": spaces.MultiBinary(2), "b": spaces.Discrete(9)})  # type: ignore[assignment]
    action_space = spaces.Discrete(3, start=-1)  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return {"a": self.np_random.integers(0, 2, 2, dtype="int8"), "b": 7}, {}

    def step(self, action: int) -> Any:
        return {"a": [0, 1], "b": 3}, float(action), False, False, {}


gymnasium.register("tests/Counter-v0", f"{__name__}:Counter")
gymnasium.register("tests/CounterTo2-v0", f"{__name__}:Counter", reward_threshold=2)


def test_a_game_without_words_is_told_in_numbers() -> None:
    env = GymInWords("tests/Counter-v0", turns=2)
    text, _ = env.reset(seed=0)
    assert re.fullmatch(
        r"This is the game tests/Counter-v0\. Answer with one word: -1, 0 or 1\.\n[01] [01] 7", text
    )
    assert env.step("-1")[:2] == ("0 1 3", -1.0)
    assert env.step("1")[1:] == (1.0, False, True, {"metrics": {"turns": 2, "unreadable": 0}})


@pytest.mark.parametrize("answers, success", [("1 1 ?", True), ("1 1 -1", False), ("1 1 1", True)])
def test_success_by_the_reward_threshold(answers: str, success: bool) -> None:
    env = GymInWords("tests/CounterTo2-v0", turns=3, penalty=0)
    env.reset(seed=0)
    assert [env.step(answer) for answer in answers.split()][-1][4]["success"] is success


def test_own_words() -> None:
    words = {"intro": "", "observation": "{letter}{0}", "actions": ["W", "S", "E", "N E"]}
    env = make_environment(
        "gearshift/GymInWords-v0", game=LAKE, options={**DRY, "desc": ["SF", "FG"]}, words=words
    )
    assert env.reset(seed=0)[0] == "A0"
    assert env.step("n e")[0] == "A0" and env.step("s")[0] == "C2"
    assert env.step("n")[:2] == ("Answer with one word: W, S, E or N E.\nC2", -0.1)
    assert env.action_space.sample() in words["actions"]


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (
            {"game": "CartPole-v1"},
            "cannot be put into words; they must be made of Discrete, MultiDiscrete or",
        ),
        ({"game": "Pendulum-v1"}, "cannot be named; they must be Discrete."),
        ({"game": "FrozenLak-v1"}, "no environment FrozenLak-v1; did you mean FrozenLake-v1"),
        ({"options": {"colour": "red"}}, "FrozenLake-v1 cannot be made with {'colour': 'red'}"),
        ({"words": {"intr": ""}}, "words has no intr; it has intro, observation and actions"),
        ({"words": {"actions": ["l", "r"]}}, "must name FrozenLake-v1's 4 moves, each differently"),
        ({"words": {"actions": ["a", "A", "b", "c"]}}, "4 moves, each differently"),
        ({"words": {"actions": ["a", "", "b", "c"]}}, "4 moves, each differently"),
        (
            {"words": {"observation": "{lettr}"}},
            "has {0}, {row}, {column}, {letter}, {map}, {moves}",
        ),
        ({"words": {"intro": "{1}"}}, "words '{1}' cannot be filled in"),
        ({"words": {"intro": "{0[a]}"}}, "cannot be filled in"),
        ({"words": {"intro": "{row"}}, "cannot be filled in"),
        ({"turns": 0}, "turns=0, penalty=0.1 is not a game"),
        ({"penalty": -1}, "turns=100, penalty=-1 is not a game"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_environment("gearshift/GymInWords-v0", **kwargs)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["{0", "{letter", "{", "}", "[a]", ".b", ":d", "!x"]), max_size=5))
def test_any_template_is_filled_in_or_refused(parts: list[str]) -> None:
    try:
        env = GymInWords(LAKE, words={"observation": "".join(parts)})
    except ConfigError as error:
        assert "cannot be filled in" in str(error)
    else:
        env.reset(seed=0)
        env.step("down")


@pytest.mark.parametrize("mode, kwargs", [("sync", {}), ("async", {"shared_memory": False})])
@pytest.mark.parametrize(
    "id, answers",
    [("gearshift/GymInWords-v0", ["down", "right", "up"]), ("gearshift/GuessNumber-v0", "579")],
)
def test_vectors(id: str, answers: list[str], mode: str, kwargs: dict[str, Any]) -> None:
    alone = [make_environment(id) for _ in answers]
    many = gymnasium.make_vec(id, num_envs=3, vectorization_mode=mode, vector_kwargs=kwargs)
    texts, infos = many.reset(seed=[3, 4, 5])  # type: ignore[arg-type]
    begun = [env.reset(seed=seed) for env, seed in zip(alone, (3, 4, 5), strict=True)]
    assert list(texts) == [text for text, _ in begun]
    assert list(infos["messages"]) == [info["messages"] for _, info in begun]
    for _ in range(2):
        texts, rewards, ended, cut, _ = many.step(answers)
        steps = [env.step(answer) for env, answer in zip(alone, answers, strict=True)]
        assert list(zip(texts, rewards, ended, cut, strict=True)) == [s[:4] for s in steps]
    many.close()


def test_a_vector_never_shows_memory_that_holds_no_texts() -> None:
    # Gymnasium 1.4 reads the shared memory of texts once, before they are there.
    with pytest.raises(ValueError, match="shared_memory=False"):
        gymnasium.make_vec("gearshift/GymInWords-v0", num_envs=2, vectorization_mode="async")


ANYWHERE = {
    "game": LAKE,
    "options": {**DRY, "desc": ["SSSS", "SHSH", "SSSH", "HSSG"]},
    "words": {"intro": "", "observation": "{letter}"},
}


def labelled(folder: Path, seed: int = 0, **keys: Any) -> list[list[dict[str, str]]]:
    config = t.GymConfig(**{"kwargs": ANYWHERE, "labelled": 30, **keys})
    path = t.prepare(config, seed, folder)["labelled"]
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert len(rows) == config.labelled
    return rows


def test_labelled_random_play(tmp_path: Path) -> None:
    rows = labelled(tmp_path, system="You skate.")
    for messages in rows:
        turns = ["user", "assistant"] * (len(messages) // 2)
        assert [m["role"] for m in messages] == ["system", *turns]
        assert messages[0]["content"] == "You skate."
    said = [m["content"] for messages in rows for m in messages]
    assert set(said) >= set(MOVES[LAKE]) | set("ABCDEGIJKNO")
    assert labelled(tmp_path / "same", system="You skate.") == rows
    assert labelled(tmp_path / "other", seed=1, system="You skate.") != rows
    assert t.prepare(t.GymConfig(), 0, tmp_path / "none") == {}


def test_no_start_is_in_two_splits(tmp_path: Path) -> None:
    config = t.GymConfig(kwargs=ANYWHERE, labelled=40, validation=20, heldout_fraction=0.5)
    paths = t.prepare(config, 0, tmp_path)
    rows = {n: [json.loads(x) for x in p.read_text().splitlines()] for n, p in paths.items()}
    begun: dict[str, set[str]] = {
        "labelled": {m["messages"][0]["content"] for m in rows["labelled"]}
    }
    for split in ("train", "validation", "test"):
        environment = t.make(config, paths[split])
        said = [environment.reset(options={"row": i})[0] for i in range(len(rows[split]))]
        assert said == [row["prompt"][0]["content"] for row in rows[split]]
        assert len({row["seed"] for row in rows[split]}) == len(said)
        begun[split] = set(said)
    counts = [len(begun[split]) for split in ("train", "validation", "test")]
    assert counts == [5, 3, 3] and len(set.union(*begun.values())) == 11
    assert begun["labelled"] <= begun["train"]
    assert len(rows["validation"]) == 20, "each start again, for games that have more chance"
    first = [row["cluster"] for row in rows["validation"][:3]]
    assert len(set(first)) == 3, "any first part holds all alike"


def test_a_game_with_one_start_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = t.GymConfig(kwargs={"game": "CliffWalking-v1"})
    assert t.prepare(config, 0, tmp_path) == {}
    assert "starts in 1 way only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"too few to hold some out; set task.starts=0"):
        t.prepare(config.model_copy(update={"starts": 50}), 0, tmp_path)


def test_labelled_won_keeps_only_wins(tmp_path: Path) -> None:
    def ends(won: bool) -> set[tuple[str, str]]:
        rows = labelled(tmp_path / str(won), labelled_won=won, starts=0)
        return {(m[-2]["content"], m[-1]["content"]) for m in rows}

    assert ends(True) == {("O", "right")} < ends(False)
    walled = {"game": LAKE, "options": {"desc": ["SH", "HG"]}}
    with pytest.raises(DataError, match="won 0 times in 200 episodes of gearshift"):
        labelled(tmp_path, labelled=1, labelled_won=True, kwargs=walled)


class Seeds(SayLetters):
    """Keeps the seeds of its episodes."""

    seen: list[int | None] = []  # noqa: RUF012

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        Seeds.seen.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.5, True, False, {"metrics": {"points": 3}}


gymnasium.register("tests/Seeds-v0", f"{__name__}:Seeds", order_enforce=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer())


def heldout(engine: Engine, config: t.GymConfig, path: Path) -> float:
    collector = Collector(lambda: t.make(config, path), engine.tokenizer, engine.loop)
    with engine.generating():
        starts = starts_of("validation", config.validation)
        return evaluate(collector, starts, 1, metric=config.metric).value


def test_heldout_seeds_are_in_no_training(engine: Engine, tmp_path: Path) -> None:
    config = t.GymConfig(id="tests/Seeds-v0", labelled=20, validation=20)
    Seeds.seen = []
    t.prepare(config, 0, tmp_path)
    it = trainer(RLConfig(rollout={"prompts": 20}), tmp_path, lambda: t.make(config, tmp_path))  # type: ignore[arg-type]
    used = {*Seeds.seen, *(start.seed for start in it.sampler.starts(0))}
    assert len(used) == 40 and None not in used
    Seeds.seen = []
    heldout(engine, config, tmp_path)
    assert len({*Seeds.seen}) == 20 and not used & {*Seeds.seen}


def test_the_metric_of_a_game_that_knows_no_success(engine: Engine, tmp_path: Path) -> None:
    def figure(metric: str) -> float:
        config = t.GymConfig(id="tests/Seeds-v0", metric=metric, validation=2)
        return heldout(engine, config, tmp_path)

    assert (figure("success"), figure("reward"), figure("points")) == (0, 0.5, 3)
    with pytest.raises(ConfigError, match="has no `turns`; it has success, reward, points"):
        figure("turns")
