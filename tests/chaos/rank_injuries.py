"""What is done to a run on several ranks, beside what is done to a run in one process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.chaos.injuries import Trial, damaged, source_changed
from tests.chaos.runs import BrokenError, Command

STOPPED = "gearshift: stopped"
"""In small letters: what a process says before and after the run has begun."""


def rank_killed(trial: Trial) -> str:
    """kill -9 of one rank at some moment: torchrun starts all again, and the run ends."""
    command = trial.begin(restarts=1)
    trial.moment()
    rank = _signal_one(trial, command, signal.SIGKILL)
    command.wait()
    command.must_have_ended()
    return f"rank {rank} was killed, and the run ended"


def agent_killed(trial: Trial) -> str:
    """kill -9 of torchrun at some moment: its ranks end too."""
    command = trial.begin()
    trial.moment()
    ranks = command.processes()
    command.signal(signal.SIGKILL)
    for process in ranks:  # as the machine's init, or a scheduler that cleans up, does
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    command.wait()
    return f"exit {command.code}"


def rank_asked_to_stop(trial: Trial) -> str:
    """SIGTERM to one rank: all stop after the same step, in one line."""
    command = trial.begin()
    trial.moment()
    rank = _signal_one(trial, command, signal.SIGTERM)
    return f"rank {rank}: {_stopped(command)}"


def agent_asked_to_stop(trial: Trial) -> str:
    """SIGTERM to torchrun, which passes it on: the same."""
    command = trial.begin()
    trial.moment()
    command.signal(signal.SIGTERM)
    return _stopped(command)


def rank_paused(trial: Trial) -> str:
    """One rank's machine is asleep for moments: nothing is otherwise."""
    command = trial.begin()
    for _ in range(trial.rng.randint(1, 3)):
        trial.moment()
        if processes := command.processes():
            process = trial.rng.choice(processes)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                time.sleep(trial.rng.uniform(0.05, 3))
                os.kill(process, signal.SIGCONT)
    command.wait()
    command.must_have_ended()
    return "it ended"


def _signal_one(trial: Trial, command: Command, number: int) -> int:
    """The rank that got the signal."""
    while command.running():
        if processes := command.processes():
            rank = trial.rng.randrange(len(processes))
            with suppress(ProcessLookupError):
                os.kill(processes[rank], number)
            return rank
        time.sleep(0.05)
    return -1


def _stopped(command: Command) -> str:
    command.wait()
    if command.code == 0:
        return "it ended before"
    lines = [line for line in command.said().splitlines() if line.startswith("gearshift: ")]
    if "Traceback" in command.said() or len(lines) > 1:
        raise BrokenError(f"exit {command.code} with {len(lines)} lines: {command.said()[-1500:]}")
    if lines and not lines[0].lower().startswith(STOPPED):
        raise BrokenError(f"exit {command.code}: {lines[0]}")
    return lines[0] if lines else "ended at once"  # before `run` has begun


RANK_INJURIES: dict[str, Callable[[Trial], str]] = {
    f.__name__: f
    for f in (
        rank_killed, agent_killed, rank_asked_to_stop, agent_asked_to_stop, rank_paused, damaged,
        source_changed,
    )
}  # fmt: skip
