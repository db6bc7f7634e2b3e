"""What models, servers, files and users write never steers the terminal that shows it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from gearshift.cli.main import main
from gearshift.errors import DataError
from gearshift.pipeline.records import format_record
from gearshift.runtime.progress import Progress

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e[red]x[/red] [link=http://a]b[/link]\r\x9b31m\ud800"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202e[red]x[/red] [link=http://a]b[/link]"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def pieces(*_: Any, **__: Any) -> Iterator[str]:
    yield from HOSTILE.removesuffix("\ud800")  # an escape sequence in parts


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearshift.serve.chat.stream_text", pieces)


def seen(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert not UNSAFE.search(out + err)
    return out + err


def test_an_answer_is_shown_and_not_obeyed(model: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "tiny", "hello"])
    assert SHOWN in seen(capsys)


def test_nor_in_a_chat(
    model: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    main(["chat", "tiny"])
    assert seen(capsys).count(SHOWN) == 2


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_bytes_that_are_no_text_are_asked_as_others(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"hell\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    words = ["tiny", "hell\udcff"] if command == "generate" else ["tiny"]
    main([command, *words, "--system", "be \udcff", "--max-new-tokens", "2"])
    assert "Traceback" not in seen(capsys)


def record(completion: str) -> dict[str, Any]:
    sample = {
        "row": 0, "prompt": HOSTILE, "completion": completion, "failed": False, "finished": True,
        "reward": float(len(completion)), "metrics": {}, "problem": 0,
    }  # fmt: skip
    return {
        "metric": HOSTILE, "value": 0.5, "interval": [0.1, 0.9], "n": 1, "episodes": 1,
        "samples": [sample], "split": "validation", "failures": 0, "left_out": 0, HOSTILE: 1.0,
    }  # fmt: skip


def test_nor_in_the_heldout_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"base": record(""), HOSTILE: record(HOSTILE)}
    monkeypatch.setattr("gearshift.pipeline.heldout.evaluate_run", lambda *_: (HOSTILE, found))
    monkeypatch.setattr("gearshift.pipeline.records.value_of", lambda sample, _: sample["reward"])
    monkeypatch.setattr("gearshift.rollouts.evaluate.value_of", lambda sample, _: sample["reward"])
    monkeypatch.setenv("COLUMNS", "400")
    main(["eval", "tiny"])
    out = seen(capsys)
    assert out.count(SHOWN) > 4 and f"better: {SHOWN}" in out
    assert "[red]" in format_record(record(""))


def test_nor_in_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Iterator[str]:
        raise DataError(f"{HOSTILE} at https://me:secret@h/a?token=secret.")
        yield ""

    monkeypatch.setattr("gearshift.serve.chat.stream_text", fails)
    with pytest.raises(SystemExit):
        main(["generate", "tiny", "hello"])
    said = seen(capsys)
    assert SHOWN in said and "secret" not in said and "https://h/a" in said
    for words in (
        ["run", HOSTILE], ["run", "demo", f"{HOSTILE}=1"], ["eval", HOSTILE], ["keys", HOSTILE],
        ["generate", HOSTILE, "x"], ["recipes", HOSTILE], ["run", "demo", f"run.seed={HOSTILE}"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
        said = seen(capsys)
        assert said.startswith("gearshift: ") and said.count("\n") == 1
    for words in ([HOSTILE], ["run", "demo", "--\x1b[2J"], ["keys", "a", HOSTILE]):
        with pytest.raises(SystemExit):
            main(words)
        assert "usage: " in seen(capsys)


@pytest.mark.parametrize("terminal", [True, False])
def test_nor_in_the_progress_of_a_run(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=400)
    with Progress(1, HOSTILE, console=console) as bar:
        bar.advance(**{HOSTILE: 1.0})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b]" not in text and "\u202e" not in text and "\x07" not in text
    assert SHOWN in text
