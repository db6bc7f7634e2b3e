"""The terminal chat: streams whole characters, remembers or not, and survives what does not fit."""

import io
from collections.abc import Iterator

import pytest

from gearshift.cli.main import main
from gearshift.engine import Engine, EngineConfig
from gearshift.errors import DataError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.pipeline.recipe import Recipe
from gearshift.serve.chat import chat, reply
from gearshift.types import SamplingParams
from tests.zoo import random_model

SAID = "[bold]fine\t:smile: [/b]"


@pytest.fixture
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer(), EngineConfig(max_length=200))


def test_pieces_make_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of several bytes come whole: one token is one byte here."""
    answer = [*engine.tokenizer.encode("né — 家 ok"), 2]

    class Said:
        aborted = False

        def __iter__(self) -> Iterator[int]:
            return iter(answer)

        def abort(self) -> None:
            Said.aborted = True

    monkeypatch.setattr(engine, "stream", lambda *_: Said())
    listener = reply(engine, [{"role": "user", "content": "hi"}], SamplingParams())
    next(listener)
    listener.close()
    assert Said.aborted  # whoever stops listening ends the request
    pieces = list(reply(engine, [{"role": "user", "content": "hi"}], SamplingParams()))
    assert "".join(pieces) == "né — 家 ok"
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 5


def test_a_conversation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[list[str]] = []

    def answer(_: Engine, messages: list[dict[str, str]], *args: object, **kwargs: object):
        said.append([m["content"] for m in messages])
        yield "[bold]fine"
        yield "\t:smile: [/b]"

    monkeypatch.setattr("gearshift.serve.chat.reply", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n/quit\nfour\n"))
    chat(engine, "sys", SamplingParams(), remember=True)
    assert said == [["sys", "one"], ["sys", "one", SAID, "two"], ["sys", "three"]]
    assert SAID in capsys.readouterr().out  # a model's brackets are not markup


def test_without_memory_each_request_stands_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n" + "x" * 400 + "\nthree"))
    chat(engine, None, SamplingParams(max_new_tokens=4), remember=False)
    out = capsys.readouterr().out
    assert out.count("you>") == 5 and "limit of 200" in out


def test_a_request_that_fails_is_told_as_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> Iterator[str]:
        raise DataError("The template refuses [/this] role.")
        yield ""

    monkeypatch.setattr("gearshift.serve.chat.reply", fails)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    chat(engine, None, SamplingParams(), remember=True)
    assert capsys.readouterr().out.count("refuses [/this] role") == 2


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_run_is_asked_with_the_system_message_of_its_recipe(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def answer(_: Engine, messages: list[dict[str, str]], *args: object, **kwargs: object):
        asked.append([m["content"] for m in messages])
        yield "fine"

    task = {"name": "data", "train": [{"path": "rows.jsonl"}], "system": "Be brief."}
    run = Recipe.model_validate({"model": {"name": "tiny"}, "task": task})
    monkeypatch.setattr("gearshift.pipeline.policy.find_policy", lambda name: ("tiny", run))
    monkeypatch.setattr("gearshift.serve.chat.reply", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    main([command, "runs/mine", *(["one"] if command == "generate" else [])])
    first, then = ["Be brief.", "one"], ["Be brief.", "one", "fine", "two"]
    assert asked == ([first, then] if command == "chat" else [first])
