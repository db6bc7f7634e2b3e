"""Several processes of one run (ranks): who is who, and what all of them must know alike.

Control is replicated, and work is shared: every rank holds the same rollout and takes the same
decisions from it. Only episodes, rewards and micro-batches are dealt out. So the ranks meet in few
places, no branch can part them, and one rank is the case in which nothing is sent.

What one rank raises is raised on all of them. Ranks trust each other, as they do in
torch.distributed: objects go from one to another as pickles.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from gearshift.errors import GearshiftError, InterruptedRunError, RankError
from gearshift.runtime.config import Config, Neutral
from gearshift.runtime.interrupt import Stopped, shielded
from gearshift.runtime.ranks import RankNote, describe_ranks
from gearshift.runtime.terminal import one_line, quiet

T = TypeVar("T")


class ScaleConfig(Config):
    """How a run uses several processes; torchrun or Ray starts them."""

    strategy: Literal["replicate", "fsdp"] = "replicate"
    """Where weights, gradients and the optimizer's state are. `replicate`: each rank has the whole
    weights and gradients, and its part of the master weights and moments. `fsdp`: each rank has its
    part of all of these (FSDP2), and beside them the whole weights to generate with. On several
    nodes, each node has all parts. A policy with `model.lora` is not split. One process ignores
    the key.
    """
    timeout: Neutral[float] = Field(default=3600.0, gt=0)
    """How many seconds a rank waits for another one before the run ends."""


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of a tensor in a checkpoint."""

    own: Tensor
    """What this rank holds: a run of elements, after those of the ranks before it."""
    numel: int | None
    """How many elements all ranks hold. None: the parts are no part of one tensor, and only as
    many ranks can take them up.
    """


@dataclass
class World:
    """The ranks of this run."""

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    note: RankNote | None = None
    """The file that says what this rank does, for those who ask who waits for whom."""
    sharded: bool = False
    """Whether the models that are trained are split over the ranks."""
    lost: bool = field(default=False, init=False)
    """Whether this rank can no longer meet the others."""

    @property
    def main(self) -> bool:
        """Whether this rank writes the run's files and prints its lines."""
        return self.rank == 0

    def mine(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's part of them: each `size`-th."""
        return things[self.rank :: self.size] if self.size > 1 else things

    def plays(self, number: int) -> bool:
        """Whether the group of this number is this rank's."""
        return number % self.size == self.rank

    def gather(self, own: T, what: str) -> list[T]:
        """What each rank has, in their order. `what` names it in messages."""
        return self.each(lambda: own, what)

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """What `work` gives on each rank, in their order. What it raises on one is raised on
        all, with the same message; of several, what the first rank raised.
        """
        if self.size == 1:
            return [work()]
        own: tuple[str, bytes, bytes | None]
        raised: BaseException | None = None
        try:
            own = what, _pickled(work()), None
        except (Exception, Stopped) as error:
            if getattr(error, "ends_alone", False):
                self.lost = True
                raise
            raised, own = error, (what, b"", _portable(error, self.rank))
        parts = self._exchange(own)
        for rank, (_, _, fault) in enumerate(parts):
            if fault is not None:
                told: Any = raised if raised and rank == self.rank else pickle.loads(fault)
                told.known_to_all = True
                raise told
        if len({name for name, _, _ in parts}) > 1:
            names = "; ".join(f"rank {rank}: {name}" for rank, (name, _, _) in enumerate(parts))
            self.lost = True
            raise RankError(f"The ranks do not run the same program ({names}); this is a bug.")
        return [pickle.loads(part) for _, part, _ in parts]

    def says(self, work: Callable[[], T], what: str) -> T:
        """What `work` gives on the main rank, which alone does it."""
        if self.size == 1:
            return work()
        return self.each(lambda: work() if self.main else None, what)[0]  # type: ignore[return-value]

    def dealt(self, things: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[T]]) -> list[T]:
        """A result for each of the things, in order; each rank computes those of its part."""
        parts = self.each(lambda: list(work(self.mine(things))), "parts of a computation")
        results: list[Any] = [None] * len(things)
        for rank, part in enumerate(parts):
            results[rank :: self.size] = part
        return results

    def agrees(self, error: BaseException) -> bool:
        """Whether all ranks end now, with this error or another one, so that they can still save
        together. Call it once, before anything else is done about the error.
        """
        if self.size == 1 or getattr(error, "known_to_all", False):
            return True
        if self.lost or getattr(error, "ends_alone", False):
            return False

        def fail() -> None:
            raise error

        try:
            self.each(fail, "the end of the run")
        except RankError:
            return not self.lost
        except BaseException:
            return True
        return False

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """The sum over the ranks of this rank's part of `whole`, whose length is a multiple of
        their number.
        """
        own = torch.empty(len(whole) // self.size, dtype=whole.dtype, device=whole.device)
        self._together(lambda: dist.reduce_scatter_tensor(own, whole), "gradients")
        return own

    def all_gather(self, own: Tensor) -> Tensor:
        """Each rank's part, all of one length, end to end."""
        whole = torch.empty(len(own) * self.size, dtype=own.dtype, device=own.device)
        self._together(lambda: dist.all_gather_into_tensor(whole, own), "weights")
        return whole

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            self._together(lambda: dist.all_reduce(tensor), "a sum")
        return tensor

    def meet(self, collective: Callable[[], Any], what: str) -> None:
        """A collective of another library. Raises `RankError` if another rank does not come."""
        self._together(collective, what)

    def _exchange(self, own: Any) -> list[Any]:
        parts: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(parts, own), own[0])
        return parts

    def _together(self, collective: Callable[[], Any], what: str) -> None:
        """A collective, which no signal cuts. Raises `RankError`, with who is missing, if another
        rank does not come.
        """
        if self.lost:
            raise RankError(f"Rank {self.rank} cannot meet the others for {what} any more.")
        if self.note:
            self.note.waits(what)
        try:
            with shielded():
                collective()
        except RuntimeError as error:
            self.lost = True
            others = describe_ranks(self.note.folder, self.size) if self.note else ""
            raise RankError(
                f"Rank {self.rank} waited for {what}, and another rank did not come"
                f"{f' ({others})' if others else ''}: {one_line(str(error), 200)}; the same "
                "command goes on from the last checkpoint."
            ) from error
        finally:
            if self.note:
                self.note.works()


_ALONE = World()
_world = _ALONE


def world() -> World:
    """The ranks of the run that is going on; one rank outside of `joined`."""
    return _world


@contextmanager
def joined(config: ScaleConfig, folder: Path) -> Iterator[World]:
    """Meet the other processes that torchrun has started (or Ray, whose process group is used), and
    part at the end. `folder`: the run's, in which each rank notes what it does.

    Ranks other than the first print nothing. Raises `RankError` where they do not come.
    """
    global _world
    if _world.size > 1 or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield _world
        return
    ours = not dist.is_initialized()
    if ours:
        _meet(config.timeout)
    note = RankNote(folder, dist.get_rank())
    size, sharded = dist.get_world_size(), config.strategy == "fsdp"
    _world = World(dist.get_rank(), size, config.timeout, note, sharded and size > 1)
    try:
        with note, quiet(not _world.main):
            yield _world
    finally:
        _world = _ALONE
        if ours:
            dist.destroy_process_group()


def _meet(timeout: float) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        # Objects and flags go by gloo in any case.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout)
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"Rank {os.environ.get('RANK', '?')} on {socket.gethostname()} could not meet the "
            f"others ({one_line(str(error), 200)}); start all of them with one torchrun command."
        ) from error


class _Pickler(pickle.Pickler):
    """Tensors go by the host's memory, and alone: not with the storage that they are a part of."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return NotImplemented
        alone = thing.device.type == "cpu" and thing.untyped_storage().nbytes() == thing.nbytes
        return NotImplemented if alone else (Tensor.detach, (thing.detach().cpu().clone(),))


def _pickled(thing: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(thing)
    return file.getvalue()


def _portable(error: BaseException, rank: int) -> bytes:
    """The error as bytes; one that cannot be sent becomes a `RankError` of the same words."""
    if isinstance(error, Stopped):
        error = InterruptedRunError(
            "Stopped by a signal to another rank; the same command goes on.", error.signal
        )
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
        if isinstance(error, GearshiftError | MemoryError | KeyboardInterrupt):
            return sent
    except Exception:
        pass
    text = one_line(str(error), 1000)
    return pickle.dumps(RankError(f"Rank {rank} failed: {type(error).__name__}: {text}"))
