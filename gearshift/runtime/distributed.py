"""Several processes of one run (ranks): who is who, and what all of them must know alike.

Control is replicated, and work is shared: every rank holds the same rollout and takes the same
decisions from it. Only episodes, rewards and micro-batches are dealt out. So the ranks meet in few
places, no branch can part them, and one rank is the case in which nothing is sent.

What one rank raises is raised on all of them at their next meeting. So each meeting begins with an
exchange of its name and of errors: a rank that has failed never stands in a collective that the
others do not run. Ranks trust each other, as they do in torch.distributed: objects go from one to
another as pickles.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.errors import GearshiftError, RankError
from gearshift.runtime.deepspeed_config import DeepSpeedConfig, require_deepspeed
from gearshift.runtime.exit_errors import describe_error, in_several_processes
from gearshift.runtime.interrupt import shielded
from gearshift.runtime.meeting import meet
from gearshift.runtime.ranks import RankNote, find_missing, read_ranks
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.runtime.terminal import quiet

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of a tensor in a checkpoint, cut along its first dimension."""

    own: Tensor
    """What this rank holds: `part_of(rows)` of the rows."""
    rows: int | None
    """How many rows all ranks hold. None: they hold tensors of their own, and only as many ranks
    can take them up.
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
    group: int | None = None
    """Over how many ranks they are split (`scale.split`)."""
    deepspeed: DeepSpeedConfig | None = None
    """How DeepSpeed keeps optimizers; None where it does not."""
    lost: bool = field(default=False, init=False)
    """Whether this rank can no longer meet the others."""

    @property
    def main(self) -> bool:
        """Whether this rank writes the run's files and prints its lines."""
        return self.rank == 0

    @property
    def local(self) -> int:
        """How many ranks this rank's host has, which share its memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def split(self) -> int:
        """Over how many ranks a model that is trained is split; 1: each rank has it whole."""
        return self.split_over(self.local)

    def split_over(self, local: int) -> int:
        """The same where each host has `local` ranks: FSDP2 splits models inside a host, unless
        `group` says another number; DeepSpeed splits them over all ranks.
        """
        if not self.sharded:
            return 1
        if self.deepspeed:
            return self.size
        asked = self.group or local
        return asked if 1 < asked < self.size and self.size % asked == 0 else self.size

    def mine(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's part of them: each `size`-th."""
        return things[self.rank :: self.size] if self.size > 1 else things

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This rank's part of them, as `mine`. Where models are split, each rank has equally many,
        because the ranks gather layers from each other: the first thing fills up what is missing.
        """
        own = self.mine(things)
        missing = -(-len(things) // self.size) - len(own) if self.sharded else 0
        return [*own, *[things[0]] * missing] if missing else own

    def merged(self, parts: Sequence[Sequence[T]], count: int) -> list[T]:
        """A result for each of `count` things, in order, of what each rank has for its share."""
        results: list[Any] = [None] * count
        for rank, part in enumerate(parts):
            results[rank :: self.size] = part[: len(range(rank, count, self.size))]
        return results

    def plays(self, number: int) -> bool:
        """Whether the group of this number is this rank's."""
        return number % self.size == self.rank

    def part_of(self, rows: int) -> slice:
        """This rank's part of so many rows: `ceil(rows / size)`, after those of the ranks before;
        the last ranks may have fewer, or none.
        """
        each = -(-rows // self.size)
        return slice(min(rows, self.rank * each), min(rows, (self.rank + 1) * each))

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
        except BaseException as error:
            if getattr(error, "ends_alone", False):
                self.lost = True
                raise
            raised, own = error, (what, b"", self._portable(error))
        try:
            parts = self._exchange(own)
        except RankError:
            if raised is None:
                raise
            raise raised from None  # the others have gone, so this rank ends with its own error
        for rank, (_, _, fault) in enumerate(parts):
            if fault is not None:
                told: Any = raised if raised and rank == self.rank else pickle.loads(fault)
                told.known_to_all = True
                raise told
        if len({name for name, _, _ in parts}) > 1:
            names = "; ".join(f"rank {rank}: {name}" for rank, (name, _, _) in enumerate(parts))
            self.lost = True
            bug: Any = RankError(f"The ranks do not run one program ({names}); this is a bug.")
            bug.known_to_all = not self.main
            raise bug
        return [pickle.loads(part) for _, part, _ in parts]

    def says(self, work: Callable[[], T], what: str) -> T:
        """What `work` gives on the main rank, which alone does it."""
        if self.size == 1:
            return work()
        return self.each(lambda: work() if self.main else None, what)[0]  # type: ignore[return-value]

    def dealt(self, things: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[T]]) -> list[T]:
        """A result for each of the things, in order; each rank computes those of its part."""
        parts = self.each(lambda: list(work(self.share(things))), "parts of a computation")
        return self.merged(parts, len(things))

    def agrees(self, error: BaseException) -> bool:
        """Whether all ranks end now, with this error or another one, so that they can still save
        together. The others learn of the error at their next meeting.
        """
        known: Any = error
        while known is not None and not getattr(known, "known_to_all", False):
            known = known.__cause__  # a stage says it in other words
        if known is not None:
            error.known_to_all = True  # type: ignore[attr-defined]
        elif self.size > 1 and not self.lost:

            def fail() -> None:
                raise error

            try:
                self.each(fail, "the end of the run")
            except BaseException:
                error.known_to_all = not self.lost  # type: ignore[attr-defined]
        return self.size == 1 or not self.lost

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """The sum over the ranks of this rank's part of `whole`, whose length is a multiple of
        their number.
        """
        own = torch.empty(len(whole) // self.size, dtype=whole.dtype, device=whole.device)
        self.meet(lambda: _reduce_scatter(own, whole), "gradients")
        return own

    def all_gather(self, own: Tensor) -> Tensor:
        """Each rank's part, all of one length, end to end."""
        whole = torch.empty(len(own) * self.size, dtype=own.dtype, device=own.device)
        self.meet(lambda: _all_gather(whole, own), "weights")
        return whole

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            self.meet(lambda: dist.all_reduce(tensor), "a sum")
        return tensor

    def meet(self, collective: Callable[[], Any], what: str) -> None:
        """A collective on tensors, ours or another library's, which all ranks have come to. Raises
        `RankError` if another rank does not come.
        """
        self.each(lambda: None, what)
        self._send(collective, what)

    def round_trip(self, first: int, second: int, tensor: Tensor) -> float:
        """The seconds that a tensor takes from one rank to another and back, on these ranks."""

        def send() -> None:
            if self.rank == first:
                dist.send(tensor, second)
                dist.recv(tensor, second)
            elif self.rank == second:
                dist.recv(tensor, first)
                dist.send(tensor, first)
            if tensor.device.type == "cuda":
                torch.cuda.synchronize()

        self.gather(None, "a link")
        began = time.perf_counter()
        self._send(send, "a link")
        return time.perf_counter() - began

    def _exchange(self, own: Any) -> list[Any]:
        parts: list[Any] = [None] * self.size
        self._send(lambda: dist.all_gather_object(parts, own), own[0])
        return parts

    def _send(self, collective: Callable[[], Any], what: str) -> None:
        """A collective, which no signal cuts. Raises `RankError`, with who is missing, if another
        rank does not come.
        """
        if self.lost:
            raise RankError(f"Rank {self.rank} cannot meet the others for {what} any more.")
        began = time.monotonic()
        if self.note:
            self.note.waits(what)
        with shielded():
            try:
                collective()
            except RuntimeError as error:
                self.lost = True
                raise self._missing(what, time.monotonic() - began) from error
        if self.note:
            self.note.works()

    def _missing(self, what: str, waited: float) -> RankError:
        """The error of a rank that waited in vain."""
        late = waited > 0.9 * self.timeout
        missing = find_missing(self.note.folder, self.size, late) if self.note else {}
        who = "; ".join(missing.values()) or f"another rank {'hangs' if late else 'has ended'}"
        limit = " (scale.timeout)" if late else ""
        error = RankError(
            f"{who[0].upper()}{who[1:]}; the others waited {waited:.0f} s{limit} for it at {what}; "
            "the same command goes on from what is saved."
        )
        # Of those that know it, the first speaks, unless the one that ended has spoken.
        speaker = min({*range(self.size)} - {*missing}, default=0)
        spoken = self.note and any(note["ended"] for note in read_ranks(self.note.folder))
        error.known_to_all = bool(spoken) or self.rank != speaker  # type: ignore[attr-defined]
        return error

    def _portable(self, error: BaseException) -> bytes:
        """The error as bytes; one that means nothing elsewhere becomes a `RankError` with the line
        that this rank would print.
        """
        if isinstance(error, GearshiftError | MemoryError | KeyboardInterrupt):
            with suppress(Exception):
                sent = pickle.dumps(error)
                pickle.loads(sent)
                return sent
        line, code = describe_error(error, self.note.folder.parent if self.note else None)
        other: Any = RankError(f"Rank {self.rank}: {line}")
        other.exit_code = code
        return pickle.dumps(other)


_ALONE = World()
_world = _ALONE
_met = False
"""Whether this process has met other ranks, or tried to."""


def world() -> World:
    """The ranks of the run that is going on; one rank outside of `joined`."""
    return _world


@contextmanager
def joined(config: ScaleConfig, folder: Path | None) -> Iterator[World]:
    """Meet the other processes that torchrun has started (or Ray, whose process group is used), and
    part at the end. `folder`: the run's, in which each rank notes what it does.

    Ranks other than the first print nothing. Raises `RankError` where they do not come.
    """
    global _world, _met
    if _world.size > 1 or not (dist.is_initialized() or in_several_processes()):
        yield _world
        return
    deepspeed = config.deepspeed if config.strategy == "deepspeed" else None
    if deepspeed:
        require_deepspeed()
    ours, _met = not dist.is_initialized(), True
    if ours:
        meet(config.timeout)
    rank, size = dist.get_rank(), dist.get_world_size()
    note = RankNote(folder, rank, size) if folder else None
    zero = deepspeed if size > 1 else None
    sharded = size > 1 and (config.strategy == "fsdp" or (zero is not None and zero.stage == 3))
    _world = World(rank, size, config.timeout, note, sharded, config.split, zero)
    try:
        with note or nullcontext(), quiet(not _world.main), _ending_together(_world):
            yield _world
    finally:
        lost, _world = _world.lost, _ALONE
        if ours and not lost:
            dist.destroy_process_group()


def share_error(error: Exception) -> None:
    """Let all ranks end with an error that came before they met, so that one line says it."""
    if not _met:
        with suppress(BaseException), joined(ScaleConfig(timeout=60), None):
            raise error


@contextmanager
def _ending_together(world: World) -> Iterator[None]:
    """Inside, an error of one rank ends all of them, even one after their last meeting."""
    try:
        yield
    except BaseException as error:
        world.agrees(error)
        raise
    world.gather(None, "the end of the run")


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


# Newer versions of torch warn of the older names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
