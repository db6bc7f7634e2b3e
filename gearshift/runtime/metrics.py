"""The metrics of a run: always one JSON object a line; other trackers if the recipe names them; and
seconds by phase.

Trainers only hand over a dict. Nothing is sent anywhere unless the recipe names a tracker, and a
tracker's library is imported only then.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch

from gearshift.errors import ConfigError, StorageError
from gearshift.runtime.distributed import world
from gearshift.runtime.files import read_json, reading, sync, write_json, writing
from gearshift.runtime.terminal import counted, echo, one_line
from gearshift.runtime.urls import redact_urls

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
_Tracker = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]
"""A function that logs a step's metrics, and a function that closes the tracker."""
_STEPS_KNOWN = 64
"""A run may be resumed from a checkpoint that is at most this many steps old."""


Extent = dict[str, Any]
"""How much of a file existed at some moment: the number of its bytes, and their digest."""


class MetricsLog:
    """A JSONL file of records by step that a resumed run can continue. Of several ranks the main
    one writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._hash = 0, hashlib.blake2b()
        self.newest: dict[str, Any] = {}
        """The record that was added last."""
        self._before: dict[int, Extent] = {}
        """For each of the last steps that have lines: how much of the file existed before its first
        line.
        """

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Add one line; a number that is not finite becomes null, because JSON has no word for
        it.
        """
        self.newest = _finite({"step": step, **record})
        text = json.dumps(self.newest, ensure_ascii=False, allow_nan=False)
        # JSON writes what UTF-8 cannot hold, half a surrogate pair, as this escape too.
        line = f"{text}\n".encode("utf-8", errors="backslashreplace")
        if not world().main:
            return
        if step not in self._before:
            self._before[step] = self._extent()
            self._before.pop(step - _STEPS_KNOWN, None)
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                left = memoryview(line)
                while left:  # a disk that is nearly full accepts only a part
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(start)
                raise
        self._size += len(line)
        self._hash.update(line)

    def synced(self, step: int) -> Extent:
        """How much of the file the steps before this one have written, after forcing it onto the
        disk.
        """
        if world().main and self.path.exists():
            with writing(self.path):
                sync(self.path)
        return self._before.get(step) or self._extent()

    def begin(self, extent: Extent | None) -> None:
        """Continue after this much of the file, and drop what follows it; None begins a new file.

        Raises `StorageError` if that part of the file is not there or has changed.
        """
        self._size, self._hash, self._before = 0, hashlib.blake2b(), {}
        if not world().main:
            return
        wanted = extent or self._extent()
        with writing(self.path):
            exists = self.path.exists()
            size = self.path.stat().st_size if exists else 0
        if size:
            with reading(self.path), self.path.open("rb") as file:
                left = wanted["bytes"]
                while left and (block := file.read(min(left, 1 << 20))):
                    self._hash.update(block)
                    left -= len(block)
        self._size = wanted["bytes"]
        if size < self._size or self._hash.hexdigest() != wanted["digest"]:
            what = (
                f"has {size} of {self._size}" if size < self._size else f"changed in {self._size}"
            )
            raise StorageError(
                f"{self.path} is not as the run wrote it (it {what} bytes); put it back as it was,"
                f" or delete {self.path.parent} to do this stage again."
            )
        if size > self._size:
            with writing(self.path):
                os.truncate(self.path, self._size)
                sync(self.path)

    def _extent(self) -> Extent:
        return Extent(bytes=self._size, digest=self._hash.hexdigest())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `MetricsLog`, oldest first. Raises `StorageError` on a line that is no
    record.

    Text after the last newline is ignored: a process that was killed wrote half of a line.
    """
    records = []
    with reading(path, f"put it back as it was, or delete {path}."):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"line {number} is no record")
            records.append(record)
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker learns about a run when it opens it."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    step: int
    """The first step that will be logged; above 0 in a resumed run."""
    known: dict[str, str]
    """The tracker's own name for this run, from its first start; {} in a new run."""


class Trackers:
    """The trackers that a recipe names; `log` sends a step's metrics to each of them.

    A resumed run continues the run that it began in the trackers: `trackers.json` in its folder
    keeps their names for it. A tracker that fails is reported and left out until the stage starts
    again, because the run does not depend on it.
    """

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        """Raises `ConfigError`, with the pip command, where a tracker's library is missing."""
        self._libraries = {name: _library(name) for name in names if world().main}
        self._folder, self._name, self._config = folder, run_name, config
        self._open: dict[TrackerName, _Tracker] = {}
        self.lost: dict[str, int] = {}
        """For each tracker that failed, how many steps were not sent to it."""

    def open(self, step: int) -> None:
        """Begin the run in each tracker, or continue it before this step. Raises `ConfigError`
        where a tracker refuses.
        """
        path = self._folder / "trackers.json"
        anew = "put it back as it was, or delete it, and the trackers begin new runs."
        known = read_json(path, anew) if path.exists() else {}
        self.lost = {}
        if not world().main:
            return
        for name, library in self._libraries.items():
            ids = known.setdefault(name, {})
            run = TrackedRun(self._folder, self._name, self._config, step, ids)
            try:
                self._open[name] = _OPEN[name](library, run)
            except Exception as error:  # each library raises its own errors
                raise ConfigError(
                    f"The tracker {name} does not start ({_first_line(error)}); correct that or "
                    "leave it out."
                ) from error
        if known:
            write_json(path, known)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        for name in self.lost:
            self.lost[name] += 1
        for name, (log, close) in [*self._open.items()]:
            try:
                log(step, metrics)
            except Exception as error:
                self.lost[name] = 1
                del self._open[name]
                self._tell(f"{name} failed at step {step} ({_first_line(error)}) and is left out")
                with suppress(Exception):
                    close()

    def close(self) -> None:
        """Flush the trackers, and mark their runs as finished."""
        for name, (_, close) in [*self._open.items()]:
            try:
                close()
            except Exception as error:
                self._tell(f"{name} did not close ({_first_line(error)})")
        for lost, steps in self.lost.items():
            self._tell(f"{lost} was not sent {counted(steps, 'step')}")
        self._open = {}

    def _tell(self, what: str) -> None:
        text = f"{self._name}: the tracker {what}; metrics.jsonl has everything."
        with suppress(OSError, ValueError):
            echo(text, file=sys.stderr)


def _first_line(error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return one_line(redact_urls(reason))


def _library(name: TrackerName) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ConfigError(
            f"The tracker {name} is not installed; pip install 'gearshift[{name}]' or leave it out."
        ) from None


def _tensorboard(library: Any, run: TrackedRun) -> _Tracker:
    # This purges what a run wrote after the checkpoint that it is resumed from.
    writer = library.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step or None)
    writer.add_text("config", f"```\n{json.dumps(run.config, indent=2, default=str)}\n```")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _trackio(library: Any, run: TrackedRun) -> _Tracker:
    # The name is unique: two folders may have the same name, and trackio finds runs by their names.
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


MEASURED = ("seconds/", "speed/", "memory/", "engine/", "step_time", "phases")
"""How the names of metrics begin that measure the machine, and differ from one run to the next."""


class PhaseTimer:
    """Adds up seconds by phase until they are taken, and on a GPU measures the memory at the peak
    of each phase: `with timer("generate"): ...`.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._intervals: list[tuple[str, float, float]] = []
        self._peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of this context towards `phase`; phases do not nest."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                # Kernels still run after Python goes on; their time belongs to the phase that
                # launched them.
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() / 2**30
                self._peaks[phase] = max(peak, self._peaks.get(phase, 0.0))
            self._intervals.append((phase, start, end := time.perf_counter()))
            self._seconds[phase] = self._seconds.get(phase, 0.0) + end - start

    def pop(self) -> dict[str, float]:
        """The figures since the last call of `pop`: `seconds/PHASE`, and on a GPU
        `memory/peak_gib/PHASE`.
        """
        seconds, peaks, self._seconds, self._peaks = self._seconds, self._peaks, {}, {}
        return {
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            **{f"memory/peak_gib/{phase}": value for phase, value in peaks.items()},
        }

    def intervals(self, since: float) -> list[tuple[str, float, float]]:
        """(phase, start, end) of each context since the last call, in seconds after `since`."""
        found, self._intervals = self._intervals, []
        return [(name, round(a - since, 4), round(b - since, 4)) for name, a, b in found]
