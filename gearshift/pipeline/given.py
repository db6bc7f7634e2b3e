"""What a Python call brings to a run and a recipe file cannot hold: rows, functions, callbacks.

The recipe names each of them, so that the run's folder says what the run was made from. This file
must not import `run`, which uses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.data.messages import show
from gearshift.engine import Engine
from gearshift.errors import ConfigError, DataError
from gearshift.runtime.digests import Digests
from gearshift.runtime.files import reading, write_text
from gearshift.runtime.function_marks import function_mark
from gearshift.trainers.callbacks import Callbacks

GIVEN = "given"
"""The folder of a run in which given rows lie."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller of a run hands in besides the recipe."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Rows as JSONL, by the name of their file in the folder `given` of the run."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Rewards and environments that no module holds, by their names in the recipe: `given:NAME`."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """The functions that are called between steps."""
    serving: Callable[[Engine], AbstractContextManager[Any]] = nullcontext
    """Opened around reinforcement learning, with the engine that samples: it may let other requests
    sample beside the run's."""

    def write(self, run: Path, begun: bool) -> None:
        """Write the rows into the run's folder. Raises `ConfigError` if the run has begun with
        other rows.
        """
        for name, text in self.files.items():
            path = run / GIVEN / f"{name}.jsonl"
            if begun and path.exists():
                with reading(path):
                    same = path.read_bytes() == text.encode()
                if not same:
                    raise ConfigError(
                        f"{run} was made from other rows ({name}); choose another output, or "
                        "delete it."
                    )
            write_text(path, text)

    def digests(self) -> Digests:
        """A digest of each function, which differs between its versions."""
        return {name: function_mark(function) for name, function in self.functions.items()}


def as_jsonl(rows: Iterable[Mapping[str, Any]], what: str) -> str:
    """The rows as JSONL. `what` names them in errors.

    Raises `DataError` for no row, and for a value that JSON does not hold.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(_json(row))
        except (TypeError, ValueError):
            raise DataError(f"{what}, row {number}: {_fault(row)}") from None
    if not lines:
        raise DataError(f"{what} holds no rows; give at least one.")
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    text.encode()  # half a surrogate pair is no text
    return text


def _plain(value: Any) -> Any:
    """A number or an array of NumPy or torch as a Python value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError


def _fault(row: Mapping[str, Any]) -> str:
    """Which column JSON cannot hold, and the way out."""
    for column, value in row.items():
        try:
            _json({column: value})
        except (TypeError, ValueError):
            return (
                f"`{column}` is {show(value)}, which JSON cannot hold; make it a text, a finite "
                "number, a list or a dict."
            )
    return "JSON cannot hold it; make it of texts, finite numbers, lists and dicts."
