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

SECONDS = 2.0
"""How often a rank writes its file."""
STALE = 30.0
"""A file that is older than this many seconds is of a rank that does not run."""


class RankNote:
    """Writes what this rank does; a context manager, with a thread of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder / "ranks"
        self._path = self.folder / f"{rank}.json"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write_often, daemon=True)
        self._state: dict[str, Any] = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "meetings": 0,
            "waits_for": None,
            "last": None,
            "since": time.time(),
        }

    def waits(self, what: str) -> None:
        """This rank waits for the others from now on."""
        self._state |= {"waits_for": what, "since": time.time()}

    def works(self) -> None:
        """It has met them, and works on."""
        met = {"waits_for": None, "last": self._state["waits_for"], "since": time.time()}
        self._state |= {**met, "meetings": self._state["meetings"] + 1}

    def __enter__(self) -> Self:
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
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _write_often(self) -> None:
        while True:
            with suppress(OSError):  # a full disk ends no run for a note
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self._path.with_suffix(".tmp")
                partial.write_text(json.dumps({**self._state, "at": time.time()}), encoding="utf-8")
                partial.replace(self._path)
            if self._end.wait(SECONDS):
                return


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """The notes in a run's `ranks` folder, by rank."""
    notes = []
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError):
            notes.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(notes, key=lambda note: note["rank"])


def describe_ranks(folder: Path, size: int) -> str:
    """Who is waited for, in words; empty where nothing is known."""
    notes, now = read_ranks(folder), time.time()
    if not notes:
        return ""
    here = {note["rank"] for note in notes}
    gone = [rank for rank in range(size) if rank not in here]
    stale = [n["rank"] for n in notes if now - n["at"] > STALE]
    working = [n for n in notes if n["waits_for"] is None and n["rank"] not in stale]
    parts = []
    if gone or stale:
        parts.append(f"rank {', '.join(map(str, sorted(gone + stale)))} does not run")
    parts += [
        f"rank {n['rank']} on {n['host']} (process {n['pid']}) has worked for "
        f"{now - n['since']:.0f} s since {n['last'] or 'the start'}"
        for n in working
    ]
    return "; ".join(parts)
