"""Reads the files of a run that may still be written: metrics, episodes, held-out records, recipe.
A line that is torn or is no JSON object is left out. It must not import torch.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
_BLOCK = 1 << 20
_TAIL = 64
"""How many bytes before the end of what was read show later whether the file is the same."""
_STEP = re.compile(rb'\{"step": ?(\d+)')
_STAGES = ("data", "sft", "reward", "dpo", "process", "rl")
"""The order of the stages of a recipe; other folders come after them."""


def parse(text: bytes | str) -> Any:
    """The value of a JSON text, numbers that are not finite as None; None if it is no JSON."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def parse_record(line: bytes) -> Record | None:
    """The JSON object of a line; None if it is no object."""
    record = parse(line)
    return record if isinstance(record, dict) else None


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(the offset after it, the line) for each whole line from this offset on. A file that is not
    there has none.
    """
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):  # it is still being written
                return
            start += len(line)
            yield start, line


def follows_line(path: Path, offset: int) -> bool:
    """Whether a line of the file ends at this offset, so that reading can go on there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, offset - 1))
            return offset == 0 or file.read(1) == b"\n"
    except OSError:
        return offset == 0


class RunFolder:
    """A run's folder, or a stage's alone. Only files that lie inside it are read."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._rollouts: dict[Path, RolloutFile] = {}

    def stages(self) -> list[str]:
        """The names of the folders inside that have metrics; `.` where the folder is a stage."""
        if self._inside(self.path / "metrics.jsonl"):
            return ["."]
        try:
            names = [p.name for p in self.path.iterdir() if self._inside(p / "metrics.jsonl")]
        except OSError:
            return []
        order = {name: i for i, name in enumerate(_STAGES)}
        return sorted(names, key=lambda name: (order.get(name, len(order)), name))

    def file(self, stage: str, name: str) -> Path | None:
        """A file of a stage; None if there is no such stage."""
        path = self.path / stage / name
        return path if stage in self.stages() and self._safe(path) else None

    def rollouts(self, stage: str) -> RolloutFile | None:
        """The episodes of a stage; None if it has none."""
        path = self.file(stage, "rollouts.jsonl")
        if path is None or not self._inside(path):
            return None
        return self._rollouts.setdefault(path, RolloutFile(path))

    def recipe(self) -> Record:
        """The recipe that the run resolved; {} if there is none."""
        try:
            text = (self.path / "recipe.yaml").read_text("utf-8")
            found = yaml.safe_load(text) if self._inside(self.path / "recipe.yaml") else {}
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def json(self, name: str) -> Record:
        """A JSON object in the folder; {} if there is none."""
        path = self.path / name
        try:
            found = parse(path.read_bytes()) if self._inside(path) else None
        except OSError:
            return {}
        return found if isinstance(found, dict) else {}

    def heldout(self) -> dict[str, Record]:
        """The held-out record of each policy."""
        order = {name: i for i, name in enumerate(("base", *_STAGES))}
        names = [p.stem for p in (self.path / "validation").glob("*.json")]
        names.sort(key=lambda name: (order.get(name, len(order)), name))
        return {name: self.json(f"validation/{name}.json") for name in names}

    def tokenizer_file(self) -> Path | None:
        """A tokenizer of the run, the policy's first."""
        model = self.recipe().get("model")
        named = Path(str(model.get("name", ""))) if isinstance(model, dict) else Path()
        own = [self.path / s / "tokenizer.json" for s in ("rl", "dpo", "sft", *self.stages())]
        found = [path for path in own if self._inside(path)]
        given = named / "tokenizer.json"  # the run itself has loaded this one
        return next(iter(found), given if named.is_absolute() and given.is_file() else None)

    def checkpoints(self, stage: str) -> list[int]:
        """The steps of which a stage has a checkpoint."""
        folder = self.file(stage, "checkpoints")
        found = [re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("*")] if folder else []
        return sorted(int(match[1]) for match in found if match)

    def _safe(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.path)

    def _inside(self, path: Path) -> bool:
        return path.is_file() and self._safe(path)


class RolloutFile:
    """The episodes of a stage, by step. The places of its lines are found once, and again where a
    resumed run has cut the file; a line is read when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._size, self._tail = 0, b""
        self._lines: list[tuple[int, int, int]] = []
        """(where it begins, its length, its step) for each line."""

    def lines(self) -> list[tuple[int, int, int]]:
        """(where it begins, its length, its step) for each whole line of the file now."""
        with self._lock:
            try:
                self._read_on()
            except OSError:
                self._reset()
            return self._lines

    def _read_on(self) -> None:
        with self._path.open("rb") as file:
            file.seek(max(0, self._size - _TAIL))
            if file.read(min(_TAIL, self._size)) != self._tail:
                self._reset()
                file.seek(0)
            head, begins, at = b"", self._size, self._size
            lines = self._lines = [*self._lines]  # a reader may hold the old list
            while block := file.read(_BLOCK):
                start = 0
                while (end := block.find(b"\n", start)) >= 0:
                    head += block[start : start + _TAIL] if len(head) < _TAIL else b""
                    step = _STEP.match(head)
                    number = int(step[1]) if step and len(step[1]) < 16 else len(lines)
                    lines.append((begins, at + end + 1 - begins, number))
                    head, start, begins = b"", end + 1, at + end + 1
                if len(head) < _TAIL:
                    head += block[start : start + _TAIL]
                at += len(block)
            self._size = begins
            file.seek(max(0, begins - _TAIL))
            self._tail = file.read(min(_TAIL, begins))

    def raw(self, line: tuple[int, int, int]) -> bytes:
        """The text of one of `lines()`."""
        try:
            with self._path.open("rb") as file:
                file.seek(line[0])
                return file.read(line[1])
        except OSError:
            return b""

    def step(self, step: int) -> list[Record]:
        """All episodes of a step, those without a reward last; none of a step that is not there."""
        line = next((line for line in reversed(self.lines()) if line[2] == step), None)
        return episodes(self.raw(line)) if line else []


def episodes(line: bytes) -> list[Record]:
    """The episodes of a line, those without a reward last."""
    record = parse_record(line) or {}
    lists = [record.get(name) for name in ("episodes", "left_out")]
    return [e for found in lists if isinstance(found, list) for e in found if isinstance(e, dict)]
