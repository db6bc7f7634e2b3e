"""Two ranks that meet a few times and fail, without a model, as a program: `python -m
tests.runtime.worlds FOLDER` prints what each rank of each case came to, as JSON. A rank is a fork.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch

from gearshift.errors import ConfigError, DataError, NumericalError
from gearshift.runtime.distributed import World, joined, share_error
from gearshift.runtime.interrupt import Stopped
from gearshift.runtime.links import preflight
from gearshift.runtime.scale_config import ScaleConfig

Case = Callable[[World], object]


def alone_in_a_sum(world: World) -> None:
    if world.rank == 1:
        raise DataError("row 3 is odd; correct it.")
    world.sum(torch.ones(3))


def after_the_last_meeting(world: World) -> None:
    world.sum(torch.ones(3))
    if world.rank == 1:
        raise DataError("row 3 is odd; correct it.")


def both(world: World) -> None:
    raise (NumericalError("the loss is not finite.") if world.rank else DataError("row 3 is odd."))


def unexpected(world: World) -> None:
    world.each(lambda: {}["lost"] if world.rank else None, "rewards")


def in_other_words(world: World) -> None:
    try:
        unexpected(world)
    except Exception as error:
        raise DataError("a stage says it in other words.") from error


def signalled(world: World) -> None:
    world.each(lambda: stop() if world.rank else None, "rewards")


def stop() -> None:
    raise Stopped(signal.SIGTERM)


def gone(world: World) -> None:
    world.gather(1, "the first")
    if world.rank == 1:
        os._exit(9)
    world.gather(1, "rewards")


def main_gone(world: World) -> None:
    if world.main:
        os._exit(9)
    world.all_gather(torch.ones(2))


def hangs(world: World) -> None:
    world.gather(1, "the first")
    if world.rank == 1:
        time.sleep(600)
    world.gather(1, "rewards")


def other_program(world: World) -> None:
    world.sum(torch.ones(3)) if world.main else world.gather(1, "rewards")


def fine(world: World) -> object:
    total = world.sum(torch.ones(3) * (world.rank + 1)).tolist()
    return [total, world.reduce_scatter(torch.arange(4.0)).tolist()]


def links(world: World) -> object:
    return preflight(world, "1.2")


def in_time(world: World) -> None:
    world.gather(1, "the first")


CASES: dict[str, Case] = {
    each.__name__: each
    for each in (
        fine, alone_in_a_sum, after_the_last_meeting, both, unexpected, in_other_words, signalled,
        gone, main_gone, hangs, other_program, in_time, links,
    )
}  # fmt: skip


def run(case: Case, folder: Path) -> object:
    timeout = 2.0 if case is hangs else 120.0
    place = Path("/dev/null/run") if case is fine else folder / "run"  # a disk that refuses notes
    error: BaseException
    try:
        if case is in_time and os.environ["RANK"] == "1":
            raise ConfigError("recipe.yaml does not exist; name another.")
        with joined(ScaleConfig(timeout=timeout), place) as world:
            return case(world)
    except BaseException as raised:
        share_error(raised)
        error = raised
    known = getattr(error, "known_to_all", False)
    return [type(error).__name__, str(error), getattr(error, "exit_code", 1), known]


def main() -> None:
    found = {}
    for name, case in CASES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [start(rank, port, case, folder) for rank in range(2)]
        if case is hangs:
            os.waitpid(pids[0], 0)
            os.kill(pids.pop(), signal.SIGKILL)
        for pid in pids[case is hangs :]:
            os.waitpid(pid, 0)
        texts = [path.read_text() for path in sorted(folder.glob("came-to-*"))]
        found[name] = {
            "came_to": [json.loads(text) for text in texts],
            "notes": sorted(path.name for path in (folder / "run").glob("ranks/*")),
        }
    print(json.dumps(found))


def start(rank: int, port: int, case: Case, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    came_to = run(case, folder)
    (folder / f"came-to-{rank}").write_text(json.dumps(came_to))
    os._exit(0)


if __name__ == "__main__":
    main()
