"""Does the checks of `tests.scale.checks` on all ranks, twice, and on one; and keeps what came
of them, for the tests to compare.

    torchrun --standalone --nproc-per-node=2 -m tests.scale.program FOLDER [NAME ...]
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from gearshift.runtime import distributed
from gearshift.runtime.distributed import World, joined, world
from gearshift.runtime.scale_config import ScaleConfig
from tests.scale.checks import CALLS, CHECKS, Train
from tests.scale.outcome import Outcome


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one."""
    with (
        patch.object(distributed, "_world", World()),
        patch.object(dist, "is_initialized", lambda: False),
        patch.dict(os.environ, WORLD_SIZE="1"),
    ):
        yield


def done(train: Train, folder: Path) -> Outcome:
    """What the training comes to, or its error."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        return train(folder)
    except Exception as error:
        traceback.print_exc()
        return Outcome(error=f"{type(error).__name__}: {error}")


def on_all(train: Train, folder: Path) -> None:
    """Train on all ranks; the main one keeps what came of it, with a digest of each rank's."""
    outcome = done(train, folder)
    outcome.digests = world().gather(outcome.digest(), "digests")
    if world().main:
        torch.save(vars(outcome), folder.with_suffix(".pt"))


def main(folder: Path, *names: str) -> None:
    """Write `NAME/all.pt`, `NAME/again.pt` (the same once more) and `NAME/one.pt`; calls are not
    done again.
    """
    torch.set_num_threads(1)
    checks = {name: run for name, run in CHECKS.items() if not names or name in names}
    calls = {name: run for name, run in CALLS.items() if not names or name in names}
    outcomes = {name: done(call, folder / name / "all") for name, call in calls.items()}
    with joined(ScaleConfig(timeout=600), folder):
        for name, outcome in outcomes.items():
            on_all(lambda _, outcome=outcome: outcome, folder / name / "all")  # type: ignore[misc]
        for name, check in checks.items():
            on_all(check, folder / name / "all")
        for name, check in checks.items():
            on_all(check, folder / name / "again")
        with alone():
            rank = dist.get_rank()
            for name, check in list((checks | calls).items())[rank :: dist.get_world_size()]:
                outcome = done(check, folder / name / "one")
                torch.save(vars(outcome), folder / name / "one.pt")
        world().gather(None, "the end of the checks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
