"""The progress of long work: phase, step, tokens per second, the time left, and a few metrics.

On a terminal and in a notebook it is one live line; elsewhere (a log file, CI) it is a plain line
now and then. This file knows no trainer.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from gearshift.runtime.terminal import is_quiet, one_line

_PLAIN_SECONDS, _CELL_SECONDS = 10.0, 0.25
_WINDOW = 20


class Progress:
    """The progress over `total_steps`; a context manager. Inside another live one it prints plain
    lines.
    """

    _live: ClassVar[Progress | None] = None

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        done: int = 0,
        console: Console | None = None,
    ) -> None:
        """`done` is how many steps an earlier run did; they do not count towards this run's
        speed.
        """
        self.total, self.description, self.done = total_steps, one_line(description), done
        self._console = console or Console(stderr=True, quiet=is_quiet())
        self._phase = ""
        self._figures: dict[str, float] = {}
        self._tokens = 0
        # (time, steps, tokens) of the last advances: the speeds are moving averages over them.
        self._marks = deque([(monotonic(), done, 0)], maxlen=_WINDOW)
        self._printed = monotonic()
        self._bar: Bar | None = None
        self._cell: Any = None

    def __enter__(self) -> Progress:
        if self._console.is_jupyter:
            if Progress._live is None and not self._console.quiet:
                Progress._live, self._cell = self, _cell_line(self._text())
        elif self._console.is_terminal and Progress._live is None:
            Progress._live = self
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.done, line=self.line()
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._phase = ""
        self._show(last=True)
        if self._bar:
            self._bar.stop()
        if Progress._live is self:
            Progress._live = None

    def phase(self, name: str) -> None:
        """Show what the program is doing now, for example `generate` or `update`."""
        self._phase = name
        self._show()

    def advance(self, step: int = 1, tokens: int = 0, **figures: float) -> None:
        """Count `step` finished steps and their tokens, and show these metrics from now on."""
        self.done += step
        self._tokens += tokens
        self._figures |= figures
        self._marks.append((monotonic(), self.done, self._tokens))
        self._show()

    def line(self) -> str:
        """`12/200  generate  1,234 tokens/s  0:03:20 left  reward 0.41`."""
        (began, done_then, tokens_then), (now, _, _) = self._marks[0], self._marks[-1]
        elapsed = max(now - began, 1e-9)
        parts = [f"{self.done}/{self.total}", self._phase]
        if self._tokens > tokens_then:
            parts.append(f"{(self._tokens - tokens_then) / elapsed:,.0f} tokens/s")
        if done_then < self.done < self.total:
            left = (self.total - self.done) * elapsed / (self.done - done_then)
            parts.append(f"{timedelta(seconds=round(left))} left")
        parts += [f"{one_line(name)} {value:.3g}" for name, value in self._figures.items()]
        return "  ".join(filter(None, parts))

    def _text(self) -> str:
        return f"{self.description}  {self.line()}"

    def _show(self, last: bool = False) -> None:
        seconds = _CELL_SECONDS if self._cell else _PLAIN_SECONDS
        if self._bar:
            self._bar.update(self._task, completed=self.done, line=self.line(), refresh=last)
        elif last or monotonic() - self._printed >= seconds:
            self._printed = monotonic()
            if self._cell:
                self._cell.update({"text/plain": self._text()}, raw=True)
            else:
                self._console.print(self._text(), markup=False, highlight=False, soft_wrap=True)


def _cell_line(text: str) -> Any:
    """A line in the output of a notebook's cell that can be written over: rich needs ipywidgets for
    that, which not every notebook has.
    """
    from IPython.display import display

    return display({"text/plain": text}, raw=True, display_id=True)
