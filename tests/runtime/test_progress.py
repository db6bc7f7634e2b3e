"""What the progress line says, on a terminal and off it."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from gearshift.runtime import progress
from gearshift.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "monotonic", lambda: clock.now)
    return clock


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_line_says_phase_step_speed_time_and_figures(clock: SimpleNamespace) -> None:
    with Progress(200, "rl", console=plain()) as bar:
        assert bar.line() == "0/200"
        bar.phase("generate")
        clock.now = 10
        bar.advance(1, tokens=12_340, reward=0.41234, kl=1e-5)
        assert bar.line() == (
            "1/200  generate  1,234 tokens/s  0:33:10 left  reward 0.412  kl 1e-05"
        )


def test_steps_of_an_earlier_run_say_nothing_about_speed(clock: SimpleNamespace) -> None:
    with Progress(100, "rl", done=90, console=plain()) as bar:
        assert bar.line() == "90/100"
        clock.now = 6
        bar.advance()
        assert bar.line() == "91/100  0:00:54 left"


def test_speed_is_that_of_the_last_steps(clock: SimpleNamespace) -> None:
    with Progress(100, "sft", console=plain()) as bar:
        for seconds in [50.0] * 10 + [1.0] * 30:
            clock.now += seconds
            bar.advance(tokens=10)
        assert bar.line() == "40/100  10 tokens/s  0:01:00 left"


def test_off_a_terminal_a_line_now_and_then(clock: SimpleNamespace) -> None:
    console = plain()
    with Progress(30, "sft [1]", console=console) as bar:
        for _ in range(30):
            clock.now += 1
            bar.phase("update")
            bar.advance(tokens=5)
    lines = said(console).splitlines()
    assert [line.split("  ")[1] for line in lines] == ["9/30", "19/30", "29/30", "30/30"]
    assert lines[-1] == "sft [1]  30/30  5 tokens/s"


def test_on_a_terminal_one_live_bar(clock: SimpleNamespace) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(3, "rl", console=console) as outer:
        outer.advance(1, tokens=5, reward=0.5)
        with Progress(2, "held-out", console=console) as inner:
            inner.advance(2)
        outer.phase("generate")
    text = said(console)
    assert "reward 0.5" in text
    assert "held-out  2/2\n" in text.replace("\r", "")
    assert Progress._live is None
    with pytest.raises(ZeroDivisionError), Progress(3, "rl", console=console):
        _ = 1 / 0
    assert Progress._live is None


def test_a_notebook_has_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            said.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        said.append(data["text/plain"])
        return Handle()

    module = ModuleType("IPython.display")
    monkeypatch.setattr(module, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with Progress(2, "sft", console=Console(force_jupyter=True)) as progress:
        progress.advance(2, loss=0.5)
    assert said[0].startswith("sft  0/2") and said[-1].startswith("sft  2/2")
    said.clear()
    with Progress(2, "sft", console=Console(force_jupyter=True, quiet=True)) as progress:
        progress.advance(2)
    assert not said
