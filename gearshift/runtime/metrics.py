"""Figures of a run: one JSON object a line, always; other trackers if asked; seconds by phase.

Trainers only hand over a dict. Nothing is sent anywhere unless the recipe names a tracker, and a
tracker's library is imported only then.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch

from gearshift.errors import ConfigError, DataError
from gearshift.runtime.files import write_json, writing

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
_Tracker = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]
"""How to log a step's metrics, and how to close."""


class MetricsLog:
    """A JSONL file of records by step that a resumed run can take up again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Add one line; a figure that is not finite becomes null, as JSON has no word for it."""
        line = json.dumps(_finite({"step": step, **record}), ensure_ascii=False, allow_nan=False)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and the torn last line of a run that was killed."""
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        with writing(self.path):
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `MetricsLog`, oldest first. Raises `DataError` on a line of another kind."""
    # What follows the last newline is empty, or a line that a crash cut short.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        line = 1 + next(i for i, text in enumerate(lines) if text == error.doc)
        raise DataError(f"{path}, line {line} is not JSON; delete the line.") from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it opens it."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    step: int
    """The first step to come; above 0 in a run that is resumed."""
    known: dict[str, str]
    """The tracker's own name of this run, from when it was begun; {} in a new one."""


class Trackers:
    """The trackers that a recipe names; `log` hands a step's metrics to each.

    A resumed run goes on in the trackers' run that it began: `trackers.json` in the folder keeps
    how they call it.
    """

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        """Raises `ConfigError`, with the pip install, where a tracker's library is missing."""
        self._libraries = {name: _library(name) for name in names}
        self._folder, self._name, self._config = folder, run_name, config
        self._open: list[_Tracker] = []

    def open(self, step: int) -> None:
        """Begin, or go on before this step. Raises `ConfigError` where a tracker refuses."""
        path = self._folder / "trackers.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, library in self._libraries.items():
            ids = known.setdefault(name, {})
            run = TrackedRun(self._folder, self._name, self._config, step, ids)
            try:
                self._open.append(_OPEN[name](library, run))
            except Exception as error:  # each library has its own kinds
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ConfigError(
                    f"The tracker {name} does not start ({reason}); mend that or leave it out."
                ) from error
        if known:
            write_json(path, known)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's figures."""
        for log, _ in self._open:
            log(step, metrics)

    def close(self) -> None:
        """Flush, and mark the runs as finished."""
        for _, close in self._open:
            close()


def _library(name: TrackerName) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ConfigError(
            f"The tracker {name} is not installed; pip install 'gearshift[{name}]' or leave it out."
        ) from None


def _tensorboard(library: Any, run: TrackedRun) -> _Tracker:
    # What a run wrote after the checkpoint that it goes on from is purged.
    writer = library.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step or None)
    writer.add_text("config", f"```\n{json.dumps(run.config, indent=2, default=str)}\n```")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _trackio(library: Any, run: TrackedRun) -> _Tracker:
    # A name of its own: two folders may be called alike, and trackio knows runs by their names.
    name = run.known.setdefault("name", f"{run.name}-{uuid4().hex[:8]}")
    opened = library.init("gearshift", name=name, config=dict(run.config), resume="allow")
    return lambda step, metrics: opened.log(dict(metrics), step=step), opened.finish


def _wandb(library: Any, run: TrackedRun) -> _Tracker:
    opened = library.init(
        project="gearshift",
        name=run.name,
        id=run.known.setdefault("id", uuid4().hex[:8]),
        resume="allow",
        dir=str(run.folder),
        config=dict(run.config),
    )
    return lambda step, metrics: opened.log(dict(metrics), step=step), opened.finish


def _mlflow(library: Any, run: TrackedRun) -> _Tracker:
    library.set_experiment("gearshift")
    if "run_id" in run.known:
        library.start_run(run_id=run.known["run_id"])
    else:
        run.known["run_id"] = library.start_run(run_name=run.name).info.run_id
        library.log_dict(dict(run.config), "config.json")
    return lambda step, metrics: library.log_metrics(dict(metrics), step=step), library.end_run


_OPEN: dict[TrackerName, Callable[[Any, TrackedRun], _Tracker]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


class PhaseTimer:
    """Seconds by phase, added up until they are taken: `with timer("generate"): ...`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside towards `phase`; phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                # Kernels run on after Python; their time belongs to the phase that launched them.
                torch.cuda.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
