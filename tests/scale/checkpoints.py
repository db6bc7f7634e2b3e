"""Checkpoints of several ranks, without a run: `python -m tests.scale.checkpoints FOLDER [NAME...]`
prints what each check came to, as JSON. A rank is a fork.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks have no threads of others
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import hf_storage, state_dict_saver  # noqa: F401

from gearshift.errors import CheckpointError
from gearshift.runtime import checkpoint
from gearshift.runtime import flat as flats
from gearshift.runtime.distributed import Part, joined, world
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.runtime.terminal import counted

flats.LARGEST = 1000  # several buffers
CONFIG = OptimizerConfig(lr=1e-2, max_grad_norm=1e9)
ROWS = torch.arange(15.0).reshape(5, 3)
SHAPES = [(31, 33), (20, 40), (5,), (1,), (300,), (7, 3, 2)]


def made(steps: int) -> MasterAdamW:
    """An optimizer after some updates, the same on any number of ranks."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    found = MasterAdamW(parameters, CONFIG, 10)
    for _ in range(steps):
        for p in parameters:
            # Halves and quarters: their sums have no rounding.
            p.grad = torch.randint(-8, 9, p.shape).float() / 4 if world().main else None
        step(found)
    return found


def step(found: MasterAdamW) -> None:
    for p in found.parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    found.step()


def moments(found: MasterAdamW) -> list[Tensor]:
    """Each buffer's master and moments, of all ranks, without the zeros at the end."""
    whole = []
    for flat in found.flats:
        state = found.optimizer.state[flat.master]
        for x in (flat.master, state["exp_avg"], state["exp_avg_sq"]):
            own = x.detach()
            if world().size > 1:
                own = world().all_gather(own[: flat._own])
            whole.append(own[: flat._numel].clone())
    return whole


def save(folder: Path, number: int = 3) -> Path:
    tensors, state = checkpoint.flatten(
        {"o": made(3).state_dict(), "w": torch.arange(4), "rows": Part(ROWS[world().part_of(5)], 5)}
    )
    return checkpoint.save(folder, number, tensors, {"tracked": state})


def load(path: Path) -> MasterAdamW:
    tensors, state = checkpoint.load(path)
    back = checkpoint.unflatten(tensors, state["tracked"])
    assert back["w"].tolist() == [0, 1, 2, 3]
    assert torch.equal(back["rows"], ROWS[world().part_of(5)])
    found = made(0)
    found.load_state_dict(back["o"])
    return found


def writes(folder: Path) -> None:
    assert len(made(0).flats) == 3
    path = save(folder / "c")
    shards = sorted(file.name for file in path.glob("shard-*"))
    assert len(shards) == (world().size if world().size > 1 else 0), shards


def reads(folder: Path) -> None:
    """The state, and the weights after one more update, are those of a run that was not cut."""
    [path] = (folder / "c").iterdir()
    found, wanted = load(path), made(3)
    for a, b in zip(moments(found), moments(wanted), strict=True):
        assert torch.equal(a, b)
    for each in (found, wanted):
        torch.manual_seed(7)
        for p in each.parameters:
            p.grad = torch.randint(-8, 9, p.shape).float() / 4 if world().main else None
        step(each)
    for p, q in zip(found.parameters, wanted.parameters, strict=True):
        assert torch.equal(p, q)


def refused(path: Path, words: str) -> None:
    before = sorted(path.parent.iterdir())
    try:
        load(path)
    except CheckpointError as error:
        said = world().gather(str(error), "messages")
        assert words in said[0] and len(set(said)) == 1, said
    else:
        raise AssertionError(f"{words}: no error")
    assert sorted(path.parent.iterdir()) == before


def damaged(folder: Path) -> None:
    """A part that is damaged, gone, of another step, or too many is refused on all ranks."""
    path = save(folder / "d")
    other = save(folder / "other", 4)
    shard = sorted(path.glob("shard-*"))[-1]
    good = shard.read_bytes()

    def change(work: Callable[[], Any], words: str) -> None:
        world().says(work, "a change")
        refused(path, words)
        world().says(lambda: shard.write_bytes(good), "the change back")

    change(lambda: shard.write_bytes(good[:-3] + b"abc"), f"{shard.name} is damaged (its digest")
    change(shard.unlink, f"{shard.name} is damaged (it is gone)")
    change(
        lambda: shard.write_bytes(sorted(other.glob("shard-*"))[0].read_bytes()),
        f"{shard.name} is damaged (its digest",
    )
    extra = path / "shard-00009-model-00001-of-00001.safetensors"
    change(lambda: shutil.copy(shard, extra), f"{extra.name} is there, and it is of another")
    world().says(extra.unlink, "the change back")
    load(path)


def full(folder: Path) -> None:
    """A disk that is full for one rank is the same error on all, and the older checkpoint stays."""
    first = save(folder / "f", 1)

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    places = [(checkpoint, "sync"), (checkpoint, "digest"), (safetensors.torch, "save")]
    for owner, name in places:
        for rank in range(world().size):
            real = getattr(owner, name)
            if world().rank == rank:
                setattr(owner, name, fill)
            try:
                save(folder / "f", 2)
                said = "no error"
            except CheckpointError as error:
                said = str(error)
            finally:
                setattr(owner, name, real)
            texts = world().gather(said, "messages")
            assert "step-000002 cannot be written ([Errno 28] No space" in said, (name, texts)
            assert len(set(texts)) == 1, texts
            assert checkpoint.latest(folder / "f") == first
    second = save(folder / "f", 2)
    names = [path.name for path in (folder / "f").iterdir()]
    assert sorted(names) == [first.name, second.name], names


def eight_bit(folder: Path) -> None:
    """8-bit moments go on on the same number of ranks, and are refused on another one."""
    global CONFIG, SHAPES
    CONFIG = OptimizerConfig(lr=1e-2, max_grad_norm=1e9, moments="8bit")
    SHAPES = [(200, 120)]  # smaller tensors stay in fp32
    if not (folder / "e").exists():
        save(folder / "e")
        world().gather(None, "saved")
    ranks = len([*(folder / "e" / "step-000003").glob("shard-*")]) or 1
    if ranks == world().size:
        found, wanted = load(folder / "e" / "step-000003"), made(3)
        for each in (found, wanted):
            for p in each.parameters:
                p.grad = torch.full_like(p, 0.5) if world().main else None
            step(each)
        for p, q in zip(found.parameters, wanted.parameters, strict=True):
            assert torch.equal(p, q)
    else:
        refused(folder / "e" / "step-000003", f"an optimizer's state of {counted(ranks, 'rank')}")


CHECKS: dict[str, list[tuple[int, Callable[[Path], None]]]] = {
    "two": [(2, writes), (2, reads), (1, reads), (3, reads)],
    "one": [(1, writes), (2, reads)],
    "four": [(4, writes), (4, reads), (1, reads), (2, reads)],
    "damaged": [(2, damaged)],
    "full": [(2, full)],
    "8bit": [(2, eight_bit), (2, eight_bit), (1, eight_bit), (3, eight_bit)],
    "8bit of one": [(1, eight_bit), (2, eight_bit)],
}


def start(rank: int, size: int, port: int, check: Callable[[Path], None], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with joined(ScaleConfig(timeout=300), folder / "notes"):
            check(folder)
    except BaseException:
        (folder / f"failed-{check.__name__}-{size}-{rank}").write_text(traceback.format_exc())
    os._exit(0)


def main() -> None:
    came_to = {}
    for name in sys.argv[2:] or CHECKS:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        for size, check in CHECKS[name]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            pids = [start(rank, size, port, check, folder) for rank in range(size)]
            for pid in pids:
                os.waitpid(pid, 0)
        came_to[name] = [path.read_text() for path in sorted(folder.glob("failed-*"))]
    print(json.dumps(came_to))


if __name__ == "__main__":
    main()
