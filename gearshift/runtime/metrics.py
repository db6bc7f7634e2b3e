"""Figures of a run: one JSON object a line, always; other trackers if asked; seconds by phase.

A room of its own so that trainers only hand over a dict. Nothing is sent anywhere unless the recipe
names a tracker, and a tracker's library is imported only then.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from gearshift.errors import ConfigError, DataError

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and the torn last line of a run that was killed."""
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
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


class Trackers:
    """The trackers that a recipe names; `log` hands a step's metrics to each."""

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        """Raises `ConfigError`, with the pip install, where a tracker's library is missing."""
        self._open = [_OPEN[name](folder, run_name, config) for name in names]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's figures."""
        for log, _ in self._open:
            log(step, metrics)

    def close(self) -> None:
        """Flush, and mark the runs as finished."""
        for _, close in self._open:
            close()


def _library(module: str, name: TrackerName) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"The tracker {name} is not installed; pip install 'gearshift[{name}]' or leave it out."
        ) from None


def _tensorboard(folder: Path, run_name: str, config: Mapping[str, Any]) -> _Tracker:
    library = _library("torch.utils.tensorboard", "tensorboard")
    writer = library.SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _trackio(folder: Path, run_name: str, config: Mapping[str, Any]) -> _Tracker:
    run = _library("trackio", "trackio").init("gearshift", name=run_name, config=dict(config))
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _wandb(folder: Path, run_name: str, config: Mapping[str, Any]) -> _Tracker:
    library = _library("wandb", "wandb")
    run = library.init(project="gearshift", name=run_name, dir=str(folder), config=dict(config))
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _mlflow(folder: Path, run_name: str, config: Mapping[str, Any]) -> _Tracker:
    library = _library("mlflow", "mlflow")
    library.set_experiment("gearshift")
    library.start_run(run_name=run_name)
    library.log_dict(dict(config), "config.json")
    return lambda step, metrics: library.log_metrics(dict(metrics), step=step), library.end_run


_OPEN: dict[TrackerName, Callable[[Path, str, Mapping[str, Any]], _Tracker]] = {
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
