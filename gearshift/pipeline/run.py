"""A recipe's run in its folder: prepare data, evaluate, the stages, evaluate after each, report.

Each result is kept in the run's folder at once, and work whose result is there is not repeated. So
the same command continues after an interrupt, and a second run of a finished recipe only prints its
table. The stages are in `stages.py`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from gearshift.errors import CapacityError, ConfigError
from gearshift.models.load import load_config
from gearshift.models.made import DONE, check_kept, written_by
from gearshift.pipeline.check import check_recipe
from gearshift.pipeline.context import Context
from gearshift.pipeline.given import Given
from gearshift.pipeline.heldout import open_engine
from gearshift.pipeline.provenance import record_sources, trained_on
from gearshift.pipeline.recipe import STAGES, Recipe, StageName, has_begun, record_recipe, with_date
from gearshift.pipeline.records import records
from gearshift.pipeline.stages import STAGE_FUNCTIONS
from gearshift.pipeline.summary import Summary, summarise
from gearshift.runtime.allocator import give_back_freed_memory, short_of_memory
from gearshift.runtime.config import differences, identity
from gearshift.runtime.digests import file_digests, write_sealed
from gearshift.runtime.distributed import joined, world
from gearshift.runtime.folder_lock import lock_run_folder
from gearshift.runtime.interrupt import Interrupt, doing
from gearshift.runtime.terminal import echo, one_line, tolerate_lost_output
from gearshift.runtime.user_functions import given_functions


class Run:
    """One run of a recipe in its folder."""

    def __init__(
        self, recipe: Recipe, echo: Callable[[str], None] = echo, given: Given | None = None
    ) -> None:
        """`given` is what the caller hands in besides the recipe. Raises `ConfigError` if the
        folder holds a run of another recipe.
        """
        self.folder = Path(recipe.run.dir)
        self.recipe = with_date(recipe, self.folder)
        self.context = Context(self.recipe, self.folder, echo, given or Given())

    def execute(self, stages: Iterable[StageName] = STAGES) -> Summary:
        """Run these stages (and what they need of data); returns and writes the summary.

        Raises `FolderInUseError` while another process or thread writes into the folder, and
        `InterruptedRunError` after SIGTERM, SIGHUP or Ctrl-C: the same recipe goes on.
        """
        with (
            tolerate_lost_output(),
            Interrupt(),
            joined(self.recipe.scale, self.folder),
            self._agreed(),
            self._locked(),
            _own_torch(self.recipe),
            given_functions(self.context.given.functions),
        ):
            world().says(self._write_given, "the caller's data")
            return self._execute(tuple(stages))

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """Give all ranks the main one's date. Raises `ConfigError` if one of them was started with
        another recipe or in another folder.
        """
        date = world().says(lambda: self.recipe.model.date, "the date")
        model = self.recipe.model.model_copy(update={"date": date})
        self.recipe = self.context.recipe = self.recipe.model_copy(update={"model": model})
        own = {**identity(self.recipe), "folder": str(self.folder.resolve())}
        recipes = world().gather(own, "the recipe")
        world().says(lambda: _check_alike(recipes), "the comparison of recipes")
        yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The run's folder for this run alone; of several ranks the main one locks it."""
        with ExitStack() as opened:
            lock = lock_run_folder(self.folder)
            world().says(lambda: opened.enter_context(lock), "the folder's lock")
            yield

    def _write_given(self) -> None:
        self.context.given.write(self.folder, has_begun(self.folder))

    def _execute(self, wanted: Sequence[StageName]) -> Summary:
        run, recipe = self.context, self.recipe
        named = [name for name in wanted if getattr(recipe, name) is not None]
        left = world().says(lambda: self._prepare(named), "the run's beginning")
        if recipe.task:
            with doing("while preparing the data"):
                world().says(run.task.prepare, "the data")
            if left:
                run.trained = trained_on(self.folder, recipe, begun=False)
            run.heldout("base", lambda: open_engine(recipe, None))
            give_back_freed_memory()  # a GPU's cache, before the first stage plans its memory
        for name in STAGES:
            if name in named:
                self._stage(name)
        with doing("while writing the report"):
            return world().says(lambda: summarise(self.folder, recipe), "the report")

    def _prepare(self, named: Sequence[StageName]) -> bool:
        """Record what the run is made of, and check its recipe; whether anything is left to do."""
        run, recipe = self.context, self.recipe
        record_recipe(self.folder, recipe)
        kept = [*(f"{n}/{DONE}" for n in named), *["validation/base.json"] * bool(recipe.task)]
        left = not all((self.folder / file).exists() for file in kept)
        records(self.folder / "validation")  # a broken record is an error before hours of work
        if left:
            run.record_model()
            if not has_begun(self.folder):  # with data it has, and another name would be refused
                load_config(recipe.model)
                check_recipe(recipe, named)  # an error now, and not after a stage of hours
            if changed := record_sources(self.folder, recipe, named):
                run.echo(f"{changed} since the run began; what comes is rewarded by it")
        return left

    def _stage(self, name: StageName) -> None:
        """One stage, unless it was done before; `done.json` records that it is whole."""
        run, folder = self.context, self.folder / name
        if world().says((folder / DONE).exists, "whether a stage is done"):
            run.echo(f"{name}: done before, kept ({folder}){check_kept(folder)}")
            return
        began = time.perf_counter()
        with Interrupt() as interrupt, doing(f"while preparing {name}"):
            try:
                result = STAGE_FUNCTIONS[name](getattr(self.recipe, name), run)
            except BaseException as error:
                reason = short_of_memory(error)
                if reason:  # free the step's tensors, so that there is memory to save with
                    traceback.clear_frames(error.__traceback__)
                if run.stage:
                    interrupt.rest = run.stage.keep(error)
                if reason:
                    section = "rl.update" if name == "rl" else name
                    raise CapacityError(
                        f"{name}: the memory does not suffice ({one_line(reason)}); lower "
                        f"{section}.micro_batch_tokens, end other programs, or take a smaller "
                        f"model; {interrupt.rest}."
                    ) from error
                raise
            finally:
                run.stage = None

            def record() -> None:
                files = {**run.made, "digests": file_digests(folder, written_by(folder))}
                seconds = time.perf_counter() - began
                write_sealed(folder / DONE, {**result, "seconds": seconds, **files})

            world().says(record, "the end of a stage")
        give_back_freed_memory()


def _check_alike(recipes: Sequence[Any]) -> None:
    """Raises `ConfigError` unless all ranks have the recipe of the first one."""
    for rank, other in enumerate(recipes):
        if lines := differences(recipes[0], other):
            raise ConfigError(
                f"Rank {rank} was started with another recipe than rank 0 ({lines[0]}); start all "
                "of them with one command, on a disk that all of them see."
            )


@contextmanager
def _own_torch(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads inside; the caller's threads and random numbers come back after."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(recipe.model.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
