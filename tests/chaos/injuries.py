"""What is done to a run: each injury starts the command, hurts it, and looks at how it ends.

Returns what was seen, in words; raises `BrokenError` where a promise was not kept.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.runs import BrokenError, Command, fingerprint, start, start_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Trial:
    """One round: a run's folder, its random numbers, and how long the run takes if left alone."""

    folder: Path
    rng: random.Random
    seconds: float
    ranks: int = 1
    mounted: bool = False

    def begin(self, largest_file: int | None = None, restarts: int = 0) -> Command:
        if self.ranks > 1:
            return start_ranks(self.folder, self.ranks, restarts)
        return start(self.folder, largest_file)

    def moment(self) -> None:
        """Wait a part of a whole run."""
        time.sleep(self.rng.uniform(0.02, 1.0) * self.seconds)

    def goes_on(self, wanted: dict[str, str]) -> None:
        """The same command ends, with what the uncut run has."""
        last = self.begin()
        last.wait()
        last.must_have_ended()
        found = fingerprint(self.folder)
        if wrong := [k for k in wanted | found if wanted.get(k) != found.get(k)]:
            raise BrokenError(f"these files differ from the uncut run's: {', '.join(wrong)}")

    def files(self) -> list[Path]:
        """The run's files, but what its processes say and its lock."""
        run = self.folder / "run"
        return sorted(p for p in run.rglob("*") if p.is_file() and p.name != "run.lock")

    def close(self) -> None:
        """Take the small disk away; what a failed round left on it stays."""
        run = self.folder / "run"
        if self.mounted:
            shutil.copytree(run, self.folder / "left", symlinks=True)
            subprocess.run(["umount", run], check=True)


def killed(trial: Trial) -> str:
    """kill -9 at some moment."""
    command = trial.begin()
    trial.moment()
    command.kill()
    command.wait()
    return f"exit {command.code}"


def asked_to_stop(trial: Trial) -> str:
    """A signal at some moment: one line and its number, or the run ends by itself."""
    command, number = trial.begin(), trial.rng.choice(SIGNALS)
    trial.moment()
    command.signal(number)
    command.wait()
    if command.code == 0:
        return f"{number.name} came too late"
    if command.code not in (128 + number, -number):
        raise BrokenError(f"{number.name} gave exit {command.code}: {command.said()[-1500:]}")
    # Before `run` has begun, a signal ends the process as it ends any other.
    return f"{number.name}: {command.message()}" if command.code > 0 else "ended at once"


def hung(trial: Trial) -> str:
    """A reward hangs; Ctrl-C alone waits for the step, and twice it ends."""
    trigger = trial.folder / "hang"
    command = trial.begin()
    trial.moment()
    trigger.touch()
    while trigger.exists() and command.running():
        time.sleep(0.01)
    if not command.running():
        trigger.unlink(missing_ok=True)
        command.wait()
        command.must_have_ended()
        return "it ended before a reward could hang"
    time.sleep(0.3)
    command.signal(signal.SIGINT)
    time.sleep(trial.rng.choice((0.05, 0.5)))
    command.signal(signal.SIGINT)
    command.wait(30)
    if command.code != 128 + signal.SIGINT:
        raise BrokenError(f"exit {command.code}: {command.said()[-1500:]}")
    return command.message()


def damaged(trial: Trial) -> str:
    """A file changes between two starts: an error names it until it is put back, or no stage uses
    it.
    """
    killed(trial)
    files = trial.files()
    if not files:
        return "there was no file yet"
    path = trial.rng.choice(files)
    before = path.read_bytes()
    how = trial.rng.choice(("flipped", "cut", "emptied", "deleted", "zeroed"))
    if how == "flipped" and before:
        at = trial.rng.randrange(len(before))
        flipped = before[at] ^ (1 << trial.rng.randrange(8))
        path.write_bytes(before[:at] + bytes([flipped]) + before[at + 1 :])
    elif how == "cut":
        path.write_bytes(before[: trial.rng.randrange(len(before) + 1)])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "zeroed":
        path.write_bytes(bytes(len(before)))
    else:
        path.unlink()
    hurt = f"{path.relative_to(trial.folder)} {how}"
    command = trial.begin()
    command.wait()
    if command.code == 0:
        if not path.exists():  # what a finished part needs no more may be deleted
            path.write_bytes(before)
        return f"{hurt}: it went on"
    message = command.message()
    named = {path.name, *(p.name for p in path.relative_to(trial.folder).parents if p.name)}
    if command.code != 1 or not any(name in message for name in named - {"run"}):
        raise BrokenError(f"{hurt}: exit {command.code}: {message}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(before)
    return f"{hurt}: {message}"


def source_changed(trial: Trial) -> str:
    """The user's own file changes before the run goes on: an error names it, or the run had not
    used it.
    """
    killed(trial)
    path = trial.folder / trial.rng.choice(("rows.jsonl", "labelled.jsonl", "pairs.jsonl"))
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    changed = trial.rng.choice((lines[: len(lines) // 2], [*lines[1:], lines[0]]))
    path.write_text("".join(changed))
    # Only what was read of it counts; where nothing was, the run would be one of other rows.
    command = trial.begin()
    if not (trial.folder / "run" / "data" / "done.json").exists():
        command.kill()
        command.wait()
        shutil.rmtree(trial.folder / "run", ignore_errors=True)
        path.write_text(before)
        return f"{path.name} changed before it was read; begun anew"
    command.wait()
    path.write_text(before)
    if command.code == 0:
        return f"{path.name} changed: it went on"
    message = command.message()
    if command.code != 1 or path.name not in message:
        raise BrokenError(f"{path.name} changed: exit {command.code}: {message}")
    return f"{path.name} changed: {message}"


def second_hand(trial: Trial) -> str:
    """The same command is started twice: the second gets an error that names the first, and the
    first goes on.
    """
    first = trial.begin()
    trial.moment()
    alone = not first.running()
    second = trial.begin()
    second.wait()
    first.wait()
    first.must_have_ended()
    if second.code == 0:
        return "one after the other" if alone else "the second found the first one's work done"
    message = second.message()
    if second.code != 1 or str(first.pid) not in message:
        raise BrokenError(f"the second: exit {second.code}: {message}")
    return message


def small_files(trial: Trial) -> str:
    """No file may grow beyond some size: one line that names the file."""
    size = trial.rng.choice((200, 2_000, 20_000, 100_000, 300_000))
    return _refused(trial, trial.begin(largest_file=size), f"files of {size} bytes at most")


def full_disk(trial: Trial) -> str:
    """The disk is full from some moment on: one line; with room again the command goes on."""
    run = trial.folder / "run"
    if not trial.mounted and not _mount(trial, run):
        return "no small disk can be mounted here"
    command, ballast = trial.begin(), run / "ballast"
    trial.moment()
    free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
    left = trial.rng.choice((0, 4_096, 65_536, 262_144))
    with suppress(OSError):  # the run takes some of it meanwhile
        ballast.write_bytes(bytes(max(0, free - left)))
    message = _refused(trial, command, f"{left} bytes left")
    ballast.unlink(missing_ok=True)
    return message


def paused(trial: Trial) -> str:
    """The machine is busy or asleep for moments: nothing is otherwise."""
    command = trial.begin()
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(trial.rng.randint(0, 2))
    ]
    try:
        for _ in range(trial.rng.randint(1, 5)):
            time.sleep(trial.rng.uniform(0.05, 0.2) * trial.seconds)
            command.signal(signal.SIGSTOP)
            time.sleep(trial.rng.uniform(0.05, 0.5))
            command.signal(signal.SIGCONT)
        command.wait()
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    command.must_have_ended()
    return "it ended"


def _refused(trial: Trial, command: Command, hurt: str) -> str:
    """It ends by itself, or in one line that names a file."""
    command.wait()
    if command.code == 0:
        return f"{hurt}: it ended"
    message = command.message()
    if command.code != 1 or not re.search(r"run\b|cache|tmp", message):
        raise BrokenError(f"{hurt}: exit {command.code}: {message}")
    return f"{hurt}: {message}"


def _mount(trial: Trial, run: Path) -> bool:
    """A disk of 16 MiB where the run's folder is, with what it holds by now."""
    kept = trial.folder / "kept"
    if run.exists():
        run.rename(kept)
    run.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", run], capture_output=True, check=False
    )
    trial.mounted = done.returncode == 0
    if kept.exists():
        shutil.copytree(kept, run, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(kept)
    return trial.mounted


INJURIES: dict[str, Callable[[Trial], str]] = {
    f.__name__: f
    for f in (
        killed, asked_to_stop, hung, damaged, source_changed, second_hand, small_files, full_disk,
        paused,
    )
}  # fmt: skip
