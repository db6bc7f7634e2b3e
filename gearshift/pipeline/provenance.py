"""The inputs of a run: digests of the files that its stages read, and the rows that it learned
from. It must not import an engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.data import DataConfig, clean, load_rows
from gearshift.data.labels import Format, source_file
from gearshift.data.overlap import prompt_keys, row_prompts
from gearshift.data.sources import SourceConfig, source_digest
from gearshift.errors import DataError, StorageError
from gearshift.models.made import DONE, made_of
from gearshift.pipeline.recipe import SOURCES, STAGES, Recipe, StageName, has_begun, recipe_of
from gearshift.runtime.digests import (
    Digests,
    check_unchanged,
    file_digest,
    first_change,
    read_sealed,
    write_sealed,
)
from gearshift.tasks.registry import get_task
from gearshift.trainers.needs import Inputs
from gearshift.trainers.stage import BEGUN, StageConfig
from gearshift.types import Message


def prepared(folder: Path, split: str) -> Path:
    """A file that a task prepared in the folder. Raises `StorageError` if it changed since."""
    path, done = folder / f"{split}.jsonl", folder / DONE
    way_out = f"delete {folder}, and it is prepared again."
    if done.exists():
        known = read_sealed(done, way_out).get("digests", {})
        check_unchanged(folder, {n: m for n, m in known.items() if n == path.name}, way_out)
    return path


def made_from(config: StageConfig, start: str | None, run: Path) -> Digests:
    """Digests of the sources and models that a stage reads, by the names that the recipe has for
    them. `start` is the model that the stage starts from; None is the recipe's.
    """
    found: Digests = {}
    inputs = config.inputs()
    for source in _sources(inputs):
        if source.path.startswith("task:"):
            path = prepared(run / "data", source.path.removeprefix("task:"))
            found[f"data/{path.name}"] = file_digest(path)
        else:
            found[source.path] = source_digest(source.path, source.split)
    if inputs.task and (path := prepared(run / "data", "train")).exists():
        found[f"data/{path.name}"] = file_digest(path)
    for model in filter(None, (start, *inputs.models)):
        name = str(run / model) if model == "reward" else model
        label = name.removeprefix(f"{run}/")
        found |= {f"{label}/{file}": known for file, known in made_of(name).items()}
    return found


def functions_of(config: StageConfig, recipe: Recipe) -> Digests:
    """Digests of the files that the rewards' functions are in."""
    named = [*config.inputs().functions, str(getattr(recipe.task, "reward", ""))]
    files = {name.rpartition(":")[0] for name in named}
    return {file: file_digest(Path(file)) for file in sorted(files) if Path(file).is_file()}


def record_sources(run: Path, recipe: Recipe, names: Iterable[StageName]) -> str:
    """Record digests of the user's files that these stages read, before the run makes anything of
    them. Later, compare the files with that record as `check_sources` does; a file of a reward
    function may be repaired between two starts, and the change is returned as text.
    """
    files: Digests = {}
    for name in names:
        if not _stage_began(run / name):  # one that began has a record of its own
            files |= _files_of_user(getattr(recipe, name), run)
    functions = _all_functions(recipe)
    known = _recorded_sources(run) if has_begun(run) else {}
    _check_same(run, known, files)
    write_sealed(run / SOURCES, {"files": known | files | functions})
    return _changed(known, functions)


def check_sources(run: Path, stage: Path, now: Digests) -> None:
    """Raises `StorageError` if a file that a stage has just read changed since the run began. A
    stage that began earlier compares its own record.
    """
    if not _stage_began(stage):
        _check_same(run, _recorded_sources(run), now)


def check_functions(run: Path, recipe: Recipe) -> None:
    """Raises `StorageError` if a file of a reward function changed since the run was last started:
    policies that are measured by different functions cannot be compared.
    """
    _check_same(run, _recorded_sources(run), _all_functions(recipe))


def _all_functions(recipe: Recipe) -> Digests:
    configs = filter(None, (getattr(recipe, name) for name in STAGES))
    return {n: known for config in configs for n, known in functions_of(config, recipe).items()}


def _check_same(run: Path, known: Digests, now: Digests) -> None:
    if changed := _changed(known, now):
        raise StorageError(
            f"{changed} since the run in {run} began; put it back as it was, or delete "
            f"{run / SOURCES} to go on with it as it is now."
        )


def _changed(known: Digests, now: Digests) -> str:
    """The first file with another digest, of those that both have, as text; empty for none."""
    both = sorted(known.keys() & now.keys())
    return first_change({name: known[name] for name in both}, {name: now[name] for name in both})


def _recorded_sources(run: Path) -> Digests:
    path = run / SOURCES
    way_out = "delete it, and the files count as they are now."
    return read_sealed(path, way_out).get("files", {}) if path.exists() else {}


def _files_of_user(config: StageConfig, run: Path) -> Digests:
    """Digests of the local files of rows and models that a stage reads and that the run does not
    make, by the names that `made_from` gives them.
    """
    found: Digests = {}
    inputs = config.inputs()
    for source in _sources(inputs):
        if os.path.isfile(file := source_file(source.path)):
            found[source.path] = file_digest(file)
    for model in inputs.models:
        if os.path.isdir(model) and not Path(model).resolve().is_relative_to(run.resolve()):
            found |= {f"{model}/{file}": known for file, known in made_of(model).items()}
    return found


def _sources(inputs: Inputs) -> Iterator[SourceConfig]:
    for data in (*inputs.learned, *inputs.heldout):
        yield from data.sources


def _stage_began(stage: Path) -> bool:
    """Whether a stage began; a checkpoint shows it where an earlier version wrote the folder."""
    return any((stage / name).exists() for name in (BEGUN, "checkpoints", DONE))


def recorded_made_from(stage: Path) -> Digests:
    """Digests of what a finished stage was made from; {} for a stage that is not finished, or that
    an earlier version made.
    """
    done = stage / DONE
    way_out = f"delete {stage} to do this stage again."
    return read_sealed(done, way_out).get("made_from", {}) if done.exists() else {}


@dataclass(frozen=True, slots=True)
class Trained:
    """The rows that a run has learned from."""

    run: Path
    """Its folder."""
    prompts: list[list[Message]]
    """The prompts of its rows."""
    clusters: frozenset[str]
    """The problems that rows of its task name."""

    def unseen(self, rows: Sequence[Mapping[str, Any]], column: str) -> list[int]:
        """The rows that share neither their prompt nor their problem, named in `column`, with what
        the run has learned from.
        """
        keys = prompt_keys([*self.prompts, *map(prompt_of, rows)])
        known = set(keys[: len(self.prompts)])
        return [
            i
            for i, (row, key) in enumerate(zip(rows, keys[len(self.prompts) :], strict=True))
            if not (key and key in known) and str(row.get(column)) not in self.clusters
        ]


def trained_on(run: Path, recipe: Recipe, begun: bool = True) -> Trained:
    """The rows of every stage that the run has begun, or (`begun=False`) of every stage that it
    has; and of the runs that it went on from. Raises `DataError` if one of their files is gone.
    """
    found, clusters = [], set()
    for name in STAGES:
        config = getattr(recipe, name)
        if config is None or (begun and not (run / name).is_dir()):
            continue
        inputs: Inputs = config.inputs()
        for data in inputs.learned:
            found += _source_rows(data, inputs.labels, run, run / name, begun)
        if inputs.task and recipe.task and (path := prepared(run / "data", "train")).exists():
            rows, column = load_rows(str(path)), get_task(recipe.task.name).cluster
            found += rows
            clusters |= {str(row[column]) for row in rows if row.get(column) is not None}
    prompts = [prompt for row in found for prompt in row_prompts(row)]
    before = run_of(Path(recipe.model.name).expanduser())
    if before and before.resolve() != run.resolve():
        earlier = trained_on(before, recipe_of(before))
        prompts, clusters = prompts + earlier.prompts, clusters | earlier.clusters
    return Trained(run, prompts, frozenset(clusters))


def _source_rows(
    data: DataConfig, labels: Format, run: Path, stage: Path, begun: bool
) -> list[dict[str, Any]]:
    """The cleaned rows of a stage's sources. Raises `StorageError` if one changed since."""
    found, known = [], recorded_made_from(stage)
    for source in data.sources:
        label = path = source.path
        if path.startswith("task:"):
            path = str(prepared(run / "data", path.removeprefix("task:")))
            label = f"data/{Path(path).name}"
        was = known.get(label)
        try:
            if was and source_digest(path, source.split) != was:
                raise StorageError(
                    f"{path} is not what {stage} was made from; put it back as it was, or "
                    "choose another run.dir."
                )
            rows = load_rows(path, source.split, labels)[: source.limit]
        except DataError as error:
            if not begun:
                raise
            raise DataError(
                f"What {run} trained on is not known, so neither is what it has not seen: {error}"
            ) from None
        found += clean(rows, data.clean)[0]
    return found


def run_of(folder: Path) -> Path | None:
    """The run to which a folder belongs: the folder may be the run's own, or that of a stage, its
    adapter or its average.
    """
    near = (folder, *folder.parents)[:3] if folder.is_dir() else ()
    return next((place for place in near if (place / "recipe.yaml").exists()), None)


def prompt_of(row: Mapping[str, Any]) -> list[Message]:
    """A row's prompt as messages."""
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
