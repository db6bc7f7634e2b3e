"""The parts that every trainer needs around its loop: a folder, resuming, checkpoints, metrics,
progress, clean interrupts.

A trainer iterates `stage.steps()` and calls `stage.log()`; the rest happens between its steps. All
state that a step may read is either tracked here or a function of (seed, step), so a resumed run
repeats the run that was cut.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from pydantic import Field, ValidationError

from gearshift.errors import CheckpointError, GearshiftError
from gearshift.models.runner import ModelRunner
from gearshift.models.sharded import ShardedModel
from gearshift.runtime import checkpoint
from gearshift.runtime.allocator import HeapGuard
from gearshift.runtime.config import Config, Neutral, differences, from_identity, identity
from gearshift.runtime.digests import Digests, read_sealed, write_sealed
from gearshift.runtime.digests import first_change as changed_files
from gearshift.runtime.distributed import world
from gearshift.runtime.files import writing
from gearshift.runtime.interrupt import Interrupt, shielded
from gearshift.runtime.metrics import Extent, MetricsLog, PhaseTimer, TrackerName, Trackers
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW
from gearshift.runtime.profile import profiled
from gearshift.runtime.progress import Progress
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import counted, echo, one_line
from gearshift.trainers.callbacks import Callbacks
from gearshift.trainers.ema import MovingAverage
from gearshift.trainers.needs import Inputs, MemoryNeeds
from gearshift.trainers.speed import training_speed

BEGUN = "begun.json"
"""The file in a stage's folder with digests of what the stage is made from."""
_STOPPING = "\nStopping after this step; a second signal stops at once.\n"


class StageConfig(Config):
    """Saving and logging, the same for every stage."""

    save_every: Neutral[int] = Field(default=50, ge=0)
    """How many steps lie between two checkpoints; with 0 only an interrupt makes one."""
    keep: Neutral[int] = Field(default=2, ge=1)
    """How many checkpoints are kept; with two, a run can continue if the newer one is damaged."""
    trackers: Neutral[tuple[TrackerName, ...]] = ()
    """The programs that receive the metrics, in addition to `metrics.jsonl`."""

    micro_batch_key: ClassVar[str] = "micro_batch_tokens"

    def describe(self) -> str:
        """What the stage does, in a few words."""
        raise NotImplementedError

    def inputs(self) -> Inputs:
        """What the stage reads."""
        raise NotImplementedError

    def memory_needs(self) -> MemoryNeeds:
        """What the stage's memory depends on."""
        raise NotImplementedError

    def with_micro_batch(self, tokens: int) -> Self:
        """The config with micro-batches of so many tokens."""
        return self.model_copy(update={"micro_batch_tokens": tokens})


class Stateful(Protocol):
    """An object whose state a checkpoint holds."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class _Mark(NamedTuple):
    """Where a stage was when its last finished step ended."""

    step: int
    """The step to go on from."""
    updates: list[int]
    """How many updates each optimizer had begun. While this number is the same, no weight has
    changed.
    """
    small: dict[str, Any]
    """The states that change before the weights change: averages, counts."""


class Stage:
    """One stage of a run. `total` steps in `folder`, resumed from its newest checkpoint."""

    def __init__(
        self,
        name: str,
        folder: Path,
        total: int,
        seed: int,
        config: StageConfig,
        recipe: Config | None = None,
        made_from: Digests | None = None,
        functions: Digests | None = None,
        callbacks: Callbacks | None = None,
        profile: bool = False,
    ) -> None:
        """`recipe` and the files of `made_from` are what a checkpoint must have been made under to
        be used again; a changed file of `functions` is only reported. Trackers get the recipe.
        `profile`: two steps are recorded in `profile.json`.
        Raises `StorageError` if the folder cannot be made.
        """
        self.name, self.folder, self.total, self.seed, self.config = (
            name,
            folder,
            total,
            seed,
            config,
        )
        self.timer = PhaseTimer()
        self._recipe, self._made_from, self._functions = recipe, made_from or {}, functions or {}
        self._tracked: dict[str, Stateful] = {}
        with writing(folder):
            world().says(lambda: folder.mkdir(parents=True, exist_ok=True), "the stage's folder")
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.rollouts = MetricsLog(folder / "rollouts.jsonl")
        keys = recipe.model_dump(mode="json") if recipe else {}
        run = folder.resolve().parent.name
        self._trackers = Trackers(config.trackers, folder, f"{run}/{name}", keys)
        self._progress: Progress | None = None
        self._profile = profile
        self._mark: _Mark | None = None
        self._callbacks = callbacks or Callbacks()

    @cached_property
    def micro_batch(self) -> MicroBatchSize:
        """The size of the stage's micro-batches; for those who track it and cut by it."""
        key = self.config.micro_batch_key
        return MicroBatchSize(attrgetter(key)(self.config), f"{self.name}.{key}")

    def track(self, **objects: Stateful) -> None:
        """Put these objects' state into every checkpoint."""
        self._tracked |= objects

    def steps(self, on_resume: Callable[[], None] = lambda: None) -> Iterator[int]:
        """The steps still to do. Before each, torch's generator is seeded from (seed, stage, step).

        Raises `InterruptedRunError` after SIGTERM or Ctrl-C, with the last finished step saved.
        """
        start, records = self._resume(on_resume)
        world().each(lambda: self._open_records(start, records), "the stage's records")
        with (
            Interrupt() as interrupt,
            interrupt.between_steps(_STOPPING),
            Progress(self.total, self.name, done=start) as progress,
            closing(self._trackers),
        ):
            self._progress, heap = progress, HeapGuard()
            self._mark = self._marked(start)
            steps = range(start, self.total)
            path = self.folder / "profile.json"
            for step in profiled(steps, path) if self._profile else steps:
                interrupt.where = f"in step {step + 1} of {self.total} ({self.name})"
                torch.manual_seed(named_seed(self.seed, f"{self.name}/{step}{_own_stream()}"))
                self._began = time.perf_counter()
                yield step
                heap.look()
                self._mark = self._marked(step + 1)
                if world().main:
                    self._callbacks.after_step(step, self.metrics, self.rollouts)
                due = self.config.save_every and (step + 1) % self.config.save_every == 0
                asked = self._asked(interrupt)
                if asked or (due and step + 1 < self.total):
                    with interrupt.shielded():
                        saved = self.save(step + 1)
                    if world().main and self._callbacks.on_checkpoint and saved:
                        self._callbacks.on_checkpoint(step + 1, saved)
                if asked:
                    interrupt.stop(
                        f"Stopped after step {step + 1} of {self.total} ({self.name}); "
                        "everything is saved, and the same command goes on from here."
                    )
            interrupt.where = f"after step {self.total} of {self.total} ({self.name})"
        interrupt.check()

    def keep(self, error: BaseException) -> str:
        """Save the steps that are finished, before an error or a signal ends the stage in the
        middle of another one or after the last; what it comes to, in words.

        There is nothing to save once an update of the unfinished step has begun, or where the other
        ranks do not end with this one. A disk that refuses, or memory that does not suffice, leaves
        the checkpoint before.
        """
        mark = self._mark if world().agrees(error) else None
        with suppress(GearshiftError, MemoryError, RuntimeError):
            if mark and self._unchanged(mark):
                with shielded():
                    self.save(mark.step, mark.small)
            if newest := checkpoint.latest(self.folder / "checkpoints"):
                step = int(newest.name.removeprefix("step-"))
                return f"the same command goes on after step {step} of {self.total}"
        return f"the same command begins {self.name} anew"

    def forget(self) -> None:
        """Make `keep` save nothing: the steps since the last checkpoint must be done again."""
        self._mark = None

    def phase(self, name: str) -> Any:
        """Time a phase of the step and show it: `with stage.phase("generate"): ...`"""
        if self._progress is not None:
            self._progress.phase(name)
        return self.timer(name)

    def log(self, step: int, metrics: dict[str, float], tokens: int, *runners: ModelRunner) -> None:
        """Record a finished step: how many `tokens` it processed, its metrics, the seconds of its
        phases, and how fast these `runners` trained; the first is the one whose tokens count.
        """
        figures = self.timer.pop()
        record = {
            **metrics,
            **figures,
            **training_speed(figures.get("seconds/train", 0.0), runners),
            "step_time": time.perf_counter() - self._began,
            "num_tokens": float(tokens),
        }
        self.metrics.append(step, {**record, "phases": self.timer.intervals(self._began)})
        self._trackers.log(step, record)
        if self._progress is not None:
            shown = {k: metrics[k] for k in ("loss", "reward", "kl", "accuracy") if k in metrics}
            self._progress.advance(1, tokens=tokens, **shown)

    def save(self, step: int, small: Mapping[str, Any] | None = None) -> Path | None:
        """Write a checkpoint from which `step` can start, unless there is one of this step or a
        later one; return its folder. `small`: states that stand in place of what the objects have
        now.
        """
        place = self.folder / "checkpoints"
        if world().says(lambda: checkpoint.newest_step(place), "the newest checkpoint") >= step:
            return None
        made: list[tuple[Any, dict[str, Any]]] = []
        world().each(lambda: made.append(self._state(step, small)), "the state of the step")
        return checkpoint.save(place, step, *made[0], keep=self.config.keep)

    def _state(self, step: int, small: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """What a checkpoint of this step holds: the tensors of this rank, and the rest."""
        states = {name: thing.state_dict() for name, thing in self._tracked.items()}
        tensors, skeleton = checkpoint.flatten({**states, **(small or {})})
        return tensors, {
            "step": step,
            "total": self.total,
            "recipe": identity(self._recipe),
            "made_from": self._made_from,
            "functions": self._functions,
            "records": {log.path.name: log.synced(step) for log in self._logs},
            "tracked": skeleton,
        }

    def _open_records(self, start: int, records: Mapping[str, Extent]) -> None:
        for log in self._logs:
            log.begin(records.get(log.path.name))
        self._trackers.open(start)

    @staticmethod
    def _asked(interrupt: Interrupt) -> bool:
        """Whether a signal to any rank asks for the end; they all end after the same step."""
        asked = max(world().gather(interrupt.signal, "the end of the step"))
        interrupt.signal = interrupt.signal or asked
        return asked != 0

    def _marked(self, step: int) -> _Mark:
        """Record that the present state is the one with which this step begins."""
        large = torch.nn.Module | ShardedModel | MasterAdamW | MovingAverage
        small = {
            name: copy.deepcopy(thing.state_dict())
            for name, thing in self._tracked.items()
            if not isinstance(thing, large)
        }
        return _Mark(step, self._updates(), small)

    def _unchanged(self, mark: _Mark) -> bool:
        """Whether there is something to save, and no rank has begun an update since the mark."""
        whole = mark.step > 0 and mark.updates == self._updates()
        return all(world().gather(whole, "whether finished steps can be saved"))

    def _updates(self) -> list[int]:
        return [t.begun for t in self._tracked.values() if isinstance(t, MasterAdamW)]

    @property
    def _logs(self) -> tuple[MetricsLog, MetricsLog]:
        return self.metrics, self.rollouts

    def _resume(self, on_resume: Callable[[], None]) -> tuple[int, dict[str, Extent]]:
        """The step to go on from, and how far the records were written then."""
        place = self.folder / "checkpoints"
        newest = world().says(lambda: checkpoint.latest(place), "the newest checkpoint")
        if newest is None:
            world().says(self._begin, "the stage's beginning")
            return 0, {}
        tensors, state = checkpoint.load(newest)
        if changed := self._changed(state):
            raise CheckpointError(
                f"{newest} was made under another configuration: {changed}; choose another "
                "run.dir, or delete that folder."
            )
        self._same_files(newest, state.get("made_from", self._made_from))
        if changed := changed_files(state.get("functions", self._functions), self._functions):
            # A function that failed is repaired in the middle of a run, with good reason.
            echo(f"{self.name}: {changed} since step {state['step']}; what comes is rewarded by it")
        if newest.name != (name := f"step-{state['step']:06d}"):
            raise CheckpointError(f"{newest} holds {name}; rename it, or delete it.")
        try:
            saved = checkpoint.unflatten(tensors, state["tracked"])
            if "micro_batch" in self._tracked:  # earlier versions did not save it
                saved.setdefault("micro_batch", self.micro_batch.state_dict())
            for name, thing in self._tracked.items():
                thing.load_state_dict(saved[name])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {one_line(str(error))}"
            raise CheckpointError(
                f"{newest} cannot be taken up ({reason}), as another version of gearshift wrote "
                f"it; go on with that one, or delete {self.folder} to do this stage again."
            ) from error
        on_resume()
        return int(state["step"]), state["records"]

    def _begin(self) -> None:
        """Record what the stage is made from, for a start that finds no checkpoint yet; or compare
        it with that.
        """
        path = self.folder / BEGUN
        if path.exists():
            known = read_sealed(path, f"delete {self.folder} to do this stage again.")
            self._same_files(self.folder, known.get("made_from", {}))
        elif self._made_from:
            write_sealed(path, {"made_from": self._made_from})

    def _same_files(self, what: Path, before: Digests) -> None:
        """Raises `CheckpointError` if the files that something was made from have changed."""
        if changed := changed_files(before, self._made_from):
            raise CheckpointError(
                f"{what} was made from other files ({changed}); put that back as it was, or "
                f"delete {self.folder} to do this stage again, or choose another run.dir."
            )

    def _changed(self, state: Mapping[str, Any]) -> str:
        """The differences between the checkpoint's settings and the present ones, as text; empty if
        there are none.
        """
        if "recipe" not in state or "records" not in state:
            return "an earlier version wrote it"
        before = state["recipe"]
        if self._recipe is not None and before is not None:
            with suppress(ValidationError):  # keys that did not exist then have their defaults
                before = identity(from_identity(type(self._recipe), before))
        lines = differences(before, identity(self._recipe))
        if not lines and state["total"] != self.total:
            lines = [f"the data made {counted(state['total'], 'step')} and make {self.total}"]
        return "; ".join(lines)


def _own_stream() -> str:
    """What the name of a rank's random numbers ends with: dropout differs between the ranks."""
    return f"/{world().rank}" if world().rank else ""
