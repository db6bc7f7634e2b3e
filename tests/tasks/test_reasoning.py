"""The reasoning task: questions and scores are reasoning-gym's; no answer is ever run."""

import json
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from gearshift.errors import ConfigError, DataError
from gearshift.runtime import tagged_json
from gearshift.tasks.reasoning import scores
from gearshift.tasks.reasoning import task as r

pytest.importorskip("reasoning_gym")

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def load(paths: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {n: [json.loads(x) for x in p.read_text().splitlines()] for n, p in paths.items()}


def config(**keys: Any) -> r.ReasoningConfig:
    return r.ReasoningConfig(**{"labelled": 8, "train": 30, "validation": 20, "test": 10, **keys})


def test_no_question_stands_in_two_files(tmp_path: Path) -> None:
    # One digit: few different sums, so a split that only hopes would overlap.
    few = config(options={**SUMS, "max_digits": 1}, train=60)
    paths = r.prepare(few, 1, tmp_path / "a")
    files = load(paths)
    asked = [
        (row.get("prompt") or row["messages"])[1]["content"]
        for rows in files.values()
        for row in rows
    ]
    assert len(asked) == len(set(asked)) == 98
    again = r.prepare(few, 1, tmp_path / "b")
    assert all(paths[n].read_bytes() == again[n].read_bytes() for n in paths)
    with pytest.raises(DataError, match=r"chain_sum gave \d+ different questions for train=5000"):
        r.prepare(few.model_copy(update={"train": 5000}), 1, tmp_path / "c")


def test_several_generators_share_the_rows_and_are_told_apart(tmp_path: Path) -> None:
    both = config(
        dataset=("chain_sum", "spell_backward"),
        options={"chain_sum": SUMS},
        labelled=3,
        validation=9,
    )
    files = load(r.prepare(both, 0, tmp_path))
    assert [row["dataset"] for row in files["validation"]].count("chain_sum") == 5
    env = r.ReasoningEnvironment(tmp_path / "validation.jsonl")
    check_env(env, skip_render_check=True)
    samples = []
    for i, row in enumerate(env.rows):
        env.reset(options={"row": i})
        answer = row["gold"] if row["dataset"] == "chain_sum" else "no"
        _, reward, done, _, info = env.step(f" {answer}\n")
        assert done and info["success"] == (row["dataset"] == "chain_sum") == (reward == 1.0)
        samples.append(info)
    assert r.by_dataset(samples) == {"success/chain_sum": 1.0, "success/spell_backward": 0.0}


def test_the_answer_between_tags(tmp_path: Path) -> None:
    files = load(r.prepare(config(options=SUMS, answer="tagged"), 0, tmp_path))
    assert files["labelled"][0]["messages"][2]["content"].startswith("<answer>")
    env = r.ReasoningEnvironment(tmp_path / "validation.jsonl")
    gold = env.rows[0]["gold"]
    for text, reward in (
        (f"well, <answer>0.5</answer> or <answer> {gold} </answer>", 1.0),
        (gold, 0.0),
        (f"<answer>{gold}", 0.0),
        (f"<answer> no, <answer>{gold}</answer>", 1.0),
        (f"<think><answer>0.5</answer></think> <answer>{gold}</answer>", 1.0),
        (f"<think> is it <answer>{gold}</answer>?", 0.0),
    ):
        env.reset(options={"row": 0})
        assert env.step(text)[1] == reward, text


# Scorers read what JSON would change: tuples (rearc) and keys that are numbers (graph_color).
@pytest.mark.parametrize("name", ["rearc", "graph_color", "rubiks_cube", "simple_geometry"])
def test_the_right_answer_is_right_after_the_file(name: str, tmp_path: Path) -> None:
    r.prepare(config(dataset=name, labelled=1, train=1, validation=2, test=1), 0, tmp_path)
    env = r.ReasoningEnvironment(tmp_path / "validation.jsonl")
    env.reset(options={"row": 1})
    _, reward, _, _, info = env.step(env.rows[1]["gold"])
    assert reward >= 1.0 and info["success"]


def row_of(name: str, tmp_path: Path) -> dict[str, Any]:
    return load(
        r.prepare(config(dataset=name, labelled=1, train=1, validation=1, test=1), 0, tmp_path)
    )["validation"][0]


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("spiral_matrix", "[__import__('pathlib').Path(PATH).touch()]"),
        ("binary_matrix", "__import__('pathlib').Path(PATH).touch()"),
        ("n_queens", "[open(PATH, 'w')]"),
        ("string_insertion", "[open(PATH, 'w')]"),
        ("countdown", "__import__('pathlib').Path(PATH).touch()"),
        ("puzzle24", "open(PATH, 'w')"),
        ("polynomial_multiplication", "(lambda: open(PATH, 'w'))()"),
        ("simple_integration", "x.__class__ + open(PATH, 'w')"),
    ],
)
def test_an_answer_is_never_run(name: str, attack: str, tmp_path: Path) -> None:
    row, target = row_of(name, tmp_path / "data"), tmp_path / "touched"
    assert scores.score(row, attack.replace("PATH", repr(str(target)))) == 0.0
    assert not target.exists()
    assert scores.score(row, row["gold"]) == 1.0


def test_powers_that_would_never_end_are_refused(tmp_path: Path) -> None:
    row = row_of("countdown", tmp_path)
    for answer in (
        "9**9**9**9",
        "9**999999",
        "((((9**9)**9)**9)**9)**9",
        "9**(9/0.0001)",
        "x**x**x**9**9",
        "9" * 4000,
    ):
        assert scores.score(row, answer) == 0.0, answer
    assert scores._harmless("polynomial_multiplication", "3*x**12 - (y + 1)^2*sin(x)/2")


def test_a_scorer_that_stumbles_over_an_answer_gives_nothing_for_it(tmp_path: Path) -> None:
    row = row_of("prime_factorization", tmp_path)
    assert scores.score(row, "purple") == 0.0  # the scorer raises ValueError
    assert scores.score({**row, "entry": tagged_json.encode({"answer": "two"})}, "purple") is None


def test_faults_of_the_recipe_are_one_line(tmp_path: Path) -> None:
    for keys, match in (
        ({"dataset": "chain_sums"}, "no generator `chain_sums`; did you mean chain_sum?"),
        ({"options": {"terms": 2}}, "task.options of chain_sum: .*terms"),
        ({"options": {"min_terms": 9}}, "task.options of chain_sum: "),
    ):
        with pytest.raises(ConfigError, match=match):
            r.prepare(config(**keys), 0, tmp_path)
    with pytest.raises(DataError, match=r"rush_hour has no right answer .*task.labelled=0"):
        r.prepare(
            config(dataset="rush_hour", labelled=1, train=1, validation=1, test=1), 0, tmp_path
        )
    paths = r.prepare(
        config(dataset="rush_hour", labelled=0, train=1, validation=1, test=1), 0, tmp_path
    )
    assert sorted(paths) == ["test", "train", "validation"]
