"""What each rank of a run does now: a small file for each in `ranks/` of the run's folder, written
while the run goes on, so that somebody else can tell who waits for whom.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gearshift.runtime.exit_errors import describe_error
from gearshift.runtime.folder_lock import process_start
from gearshift.runtime.terminal import one_line

FOLDER = "ranks"
SECONDS = 2.0
"""How often a rank writes its file."""
STALE = 30.0
"""On another machine, a rank whose file is older than this many seconds does not run."""
_PATIENCE = 8.0
"""How many seconds pass until a file that is no longer written is noticed."""


class RankNote:
    """Writes what this rank does; a context manager, with a thread of its own.

    A rank that ends with an error which the others do not know leaves the error in its file. A disk
    that refuses the file ends no run.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder = folder / FOLDER
        self._path = self.folder / f"{rank}.json"
        self._size = size
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write_often, daemon=True)
        self._state: dict[str, Any] = {
            "rank": rank,
            "ranks": size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "meetings": 0,
            "waits_for": None,
            "last": None,
            "since": time.time(),
            "ended": None,
        }

    def waits(self, what: str) -> None:
        """This rank waits for the others from now on."""
        self._state = {**self._state, "waits_for": what, "since": time.time()}

    def works(self) -> None:
        """It has met them, and works on."""
        met = {"waits_for": None, "last": self._state["waits_for"], "since": time.time()}
        self._state = {**self._state, **met, "meetings": self._state["meetings"] + 1}

    def __enter__(self) -> Self:
        if self._state["rank"] == 0:
            self._forget_others()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        if error is not None and not getattr(error, "known_to_all", False):
            self._state = {**self._state, "ended": describe_error(error, self.folder.parent)[0]}
            self._write()
            return
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _forget_others(self) -> None:
        """Remove what ranks of an earlier run left, of which there are none in this one."""
        for note in read_ranks(self.folder):
            if note["rank"] >= self._size:
                with suppress(OSError):
                    (self.folder / f"{note['rank']}.json").unlink()

    def _write_often(self) -> None:
        while not self._end.wait(SECONDS):
            self._write()

    def _write(self) -> None:
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".tmp")
            partial.write_text(json.dumps(self._state), encoding="utf-8")
            partial.replace(self._path)


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """The notes in a run's folder `ranks`, by rank; `age` is how old a note is, in seconds."""
    notes: list[dict[str, Any]] = []
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(path.read_text(encoding="utf-8"))
            note["rank"] = int(path.stem)
            notes.append({**note, "age": time.time() - path.stat().st_mtime})
    return sorted(notes, key=lambda note: note["rank"])


def runs(note: dict[str, Any], stale: float = STALE) -> bool:
    """Whether the rank still runs: on this machine its process is asked, on another one the age of
    its note.
    """
    if note["ended"]:
        return False
    if note["host"] == socket.gethostname():
        return bool(note["started"]) and note["started"] == process_start(note["pid"])
    return note["age"] < stale


def describe_rank(note: dict[str, Any]) -> str:
    """What a rank does, in words."""
    seconds = max(0.0, time.time() - note["since"])
    who = f"rank {note['rank']} on {one_line(note['host'])} (process {note['pid']})"
    if note["ended"]:
        return f"{who} ended: {one_line(note['ended'], 1000)}"
    if not runs(note):
        return f"{who} does not run any more"
    if note["waits_for"]:
        return f"{who} has waited for {note['waits_for']} for {seconds:.0f} s"
    return f"{who} has worked for {seconds:.0f} s, since {note['last'] or 'the start'}"


def describe_waits(notes: list[dict[str, Any]]) -> str:
    """Which rank the others wait for, in words."""
    ranks = notes[0]["ranks"]
    gone = sorted({*range(ranks)} - {note["rank"] for note in notes if runs(note)})
    waiting = [note for note in notes if note["waits_for"] and note["rank"] not in gone]
    working = [n["rank"] for n in notes if not n["waits_for"] and n["rank"] not in gone]
    if gone:
        return f"{_named(gone)} of {ranks} {_verb(gone, 'does', 'do')} not run"
    if not waiting:
        return "no rank waits for another one"
    if not working:
        return "all ranks are at one meeting"
    ranks_waiting = [note["rank"] for note in waiting]
    return (
        f"{_named(ranks_waiting)} {_verb(ranks_waiting, 'waits', 'wait')} for {_named(working)}, "
        f"at {waiting[0]['waits_for']}"
    )


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _verb(ranks: list[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def find_missing(folder: Path, size: int, late: bool) -> dict[int, str]:
    """The ranks that others wait for, and what each does, in words; empty where the notes do not
    say. `late`: they may run, but have not come; otherwise they have ended.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        notes = {note["rank"]: note for note in read_ranks(folder)}
        found = {
            rank: describe_rank(note)
            for rank, note in notes.items()
            if not runs(note, _PATIENCE - 1) or (late and not note["waits_for"])
        }
        if notes and not late:
            found |= {rank: f"rank {rank} has ended" for rank in range(size) if rank not in notes}
        if found or late or not notes or time.monotonic() > until:
            return dict(sorted(found.items()))
        time.sleep(0.2)
