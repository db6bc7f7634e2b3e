"""A small run on two ranks that fail in many ways, as a program: `python -m
tests.reliability.failing_ranks FOLDER [NAME...]` prints what each way came to, as JSON.

A rank is a fork, which needs no import of torch; the program ends the others as torchrun does when
one rank has failed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks have no threads of others
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gearshift.pipeline.run
from gearshift.cli.main import main as command
from gearshift.errors import DataError, NumericalError
from gearshift.rewards.composite import CompositeReward
from gearshift.rollouts.collector import Collector
from gearshift.runtime.optimizer import MasterAdamW
from gearshift.trainers.callbacks import Callbacks
from gearshift.trainers.rl.experience import ExperienceMaker

RECIPE = """
run: {dir: run}
scale: {timeout: 40}
model: {name: tiny, dtype: float32, device: cpu, threads: 1}
task:
  name: data
  train: [{path: rows.jsonl}]
  validation: 0.2
  test: 0.2
  reward: "reward.py:words"
rl:
  steps: 4
  rollout: {prompts: 2, group_size: 2, max_new_tokens: 6}
  kl: {beta: 0}
eval: {max_new_tokens: 6, limit: 2}
"""
REWARD = """
import os, time
def words(prompts, completions, **columns):
    return [len(set(text)) / 10 for text in completions]
def fails(prompts, completions, **columns):
    if os.environ["RANK"] == "1":
        raise ValueError("it does not like this")
    return words(prompts, completions)
"""
PATIENCE = 90.0


@dataclass(frozen=True)
class Way:
    """A way to fail."""

    fault: Callable[[], None] = lambda: None
    """Runs in the rank that fails, before the run."""
    rank: int = 1
    words: tuple[str, ...] = ()
    """Overrides of the recipe."""
    signals: tuple[tuple[int, int], ...] = ()
    """(rank, number): sent once the file `now` is in the folder."""


def replaced(owner: Any, name: str, after: int, act: Callable[[], Any], late: bool = False) -> None:
    """Let `act` run in (or, `late`, at the end of) the call of this method with number `after`."""
    real, calls = getattr(owner, name), [0]

    def method(*values: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == after and not late:
            act()
        result = real(*values, **named)
        if calls[0] == after and late:
            act()
        return result

    setattr(owner, name, method)


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


def at(owner: Any, name: str, act: Callable[[], Any], after: int = 2, late: bool = False) -> Any:
    return lambda: replaced(owner, name, after, act, late)


def mark(seconds: float = 0) -> Callable[[], None]:
    def act() -> None:
        Path("now").touch()
        time.sleep(seconds)

    return act


def sleep() -> None:
    time.sleep(3600)


def die() -> None:
    os._exit(9)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_OOM = RuntimeError("DefaultCPUAllocator: can't allocate memory")
_FULL = OSError(28, "No space left on device", "run/rl/metrics.jsonl")
_RUN = gearshift.pipeline.run.Run
WAYS: dict[str, Way] = {
    "whole": Way(),
    "data": Way(at(Collector, "_play", raising(DataError("row 3 is odd; correct it.")), 3)),
    "numbers": Way(at(MasterAdamW, "step", raising(NumericalError("the loss is not finite.")))),
    "unexpected": Way(at(ExperienceMaker, "__call__", raising(KeyError("lost")))),
    "reward": Way(words=('rl.rewards=[{source: "reward.py:fails"}]',)),
    "exit": Way(at(Collector, "_play", die, 3)),
    "exit_main": Way(at(Collector, "_play", die, 3), rank=0),
    "exit_early": Way(at(_RUN, "_locked", die, 1)),
    "killed": Way(at(ExperienceMaker, "__call__", kill)),
    "memory": Way(at(ExperienceMaker, "__call__", raising(_OOM))),
    "memory_update": Way(at(MasterAdamW, "step", raising(_OOM), late=True)),
    "memory_begin": Way(at(gearshift.pipeline.run, "open_engine", raising(_OOM), 1)),
    "callback": Way(at(Callbacks, "after_step", raising(ValueError("mine"))), rank=0),
    "disk": Way(at(gearshift.trainers.stage.Stage, "log", raising(_FULL)), rank=0),
    "sleeps_reward": Way(
        at(CompositeReward, "_scored", sleep),
        words=("scale.timeout=4", 'rl.rewards=[{source: "reward.py:words"}]'),
    ),
    "sleeps": Way(at(MasterAdamW, "step", sleep), words=("scale.timeout=4",)),
    "sleeps_main": Way(at(MasterAdamW, "step", sleep), rank=0, words=("scale.timeout=4",)),
    "term_one": Way(at(ExperienceMaker, "__call__", mark(1)), signals=((1, 15),)),
    "term_main": Way(at(ExperienceMaker, "__call__", mark(1)), signals=((0, 15),)),
    "term_all": Way(at(ExperienceMaker, "__call__", mark(1)), signals=((0, 15), (1, 15))),
    "twice": Way(
        at(ExperienceMaker, "__call__", mark(2)), signals=((0, 2), (1, 2), (0, 2), (1, 2))
    ),
    "twice_one": Way(at(ExperienceMaker, "__call__", mark(2)), signals=((1, 2), (1, 2))),
    "between": Way(at(Callbacks, "after_step", mark(1)), rank=0, signals=((0, 2), (1, 2))),
    "data_term": Way(
        at(gearshift.pipeline.run.Run, "_prepare", mark(2), 1), rank=0, signals=((0, 15), (1, 15))
    ),
    "data_term_one": Way(
        at(gearshift.pipeline.run.Run, "_prepare", mark(2), 1), rank=0, signals=((1, 15),)
    ),
    "load_term": Way(at(gearshift.pipeline.run, "open_engine", mark(2), 1), signals=((1, 15),)),
    "evaluation_term": Way(at(Collector, "_play", mark(2), 1), signals=((1, 15),)),
}


def main() -> None:
    place, names = Path(sys.argv[1]), sys.argv[2:] or list(WAYS)
    print(json.dumps({name: came_to(place / name, WAYS[name]) for name in names}, indent=1))


def came_to(folder: Path, way: Way) -> dict[str, Any]:
    """Run it on two ranks: exit codes, what each printed, the seconds, the folder's rest."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "reward.py").write_text(REWARD)
    rows = ({"prompt": f"lamp {i}", "completion": "on"} for i in range(12))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    pids = [fork(rank, folder, way, port) for rank in range(2)]
    codes = ended(pids, folder, way)
    run = folder / "run"
    return {
        "codes": codes,
        "said": [(folder / f"said-{rank}").read_text() for rank in range(2)],
        "seconds": round(time.monotonic() - began, 1),
        "notes": sorted(path.name for path in (run / "ranks").glob("*")),
        "checkpoints": sorted(path.name for path in run.glob("rl/checkpoints/*")),
        "tracebacks": sorted(path.name for path in run.glob("traceback*")),
        "done": (run / "rl" / "done.json").exists(),
    }


def ended(pids: list[int], folder: Path, way: Way) -> list[int | None]:
    """The exit codes. Signals go out when they are asked for; a failed rank ends the others."""
    codes: list[int | None] = [None, None]
    signals, failed = list(way.signals), 0.0
    began = time.monotonic()
    while None in codes:
        now = time.monotonic()
        for rank, pid in enumerate(pids):
            if codes[rank] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                if codes[rank] and not failed:
                    failed = now
        left = [pid for rank, pid in enumerate(pids) if codes[rank] is None]
        if signals and (folder / "now").exists():
            time.sleep(0.3)
            rank, number = signals.pop(0)
            if codes[rank] is None:
                os.kill(pids[rank], number)
        if failed and now - failed > 0.3:
            for pid in left:
                os.kill(pid, signal.SIGTERM)
            failed = now + 20
        if now - began > PATIENCE:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def fork(rank: int, folder: Path, way: Way, port: int) -> int:
    """A process with this rank."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(folder)
    said = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for old in (1, 2):
        os.dup2(said, old)
    sys.stdout, sys.stderr = (os.fdopen(old, "w", closefd=False) for old in (1, 2))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if rank == way.rank:
        way.fault()
    sys.argv = ["gearshift", "run", "recipe.yaml", *way.words]
    try:
        command()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print("OUTSIDE", repr(error), flush=True)
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
