"""Held-out evaluation of policies on a recipe's task, and what their figures say side by side.

Its own room because a run does it after each stage and `gearshift eval` for any model: both keep
the same records, `<policy>.json` in a folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gearshift.batch import pack
from gearshift.data import clean, load_rows
from gearshift.data.overlap import asked, prompt_keys, prompt_text
from gearshift.data.sources import source_mark
from gearshift.engine import Engine
from gearshift.environments.base import TextEnvironment
from gearshift.environments.processes import Separate
from gearshift.errors import ConfigError, DataError, StorageError
from gearshift.models.load import load_policy, load_tokenizer
from gearshift.models.made import DONE, made_of
from gearshift.pipeline.recipe import POLICIES, STAGES, Recipe, claim, claim_model, dated, recipe_of
from gearshift.rollouts.collector import EPISODE_TIMEOUT, WORKERS, Collector
from gearshift.rollouts.evaluate import (
    Comparison,
    Split,
    compare,
    evaluate,
    span,
    starts_of,
    value_of,
)
from gearshift.rollouts.intervals import merged
from gearshift.runtime.config import load
from gearshift.runtime.digests import (
    Digests,
    check_unchanged,
    file_digests,
    read_sealed,
    write_sealed,
)
from gearshift.runtime.files import writing
from gearshift.runtime.folder_lock import lock_run_folder
from gearshift.runtime.interrupt import doing
from gearshift.runtime.progress import Progress
from gearshift.runtime.terminal import echo
from gearshift.runtime.user_functions import describe_error
from gearshift.tasks import get_task
from gearshift.tasks.task import Task
from gearshift.types import Message

Record = dict[str, Any]
"""An `Evaluation`'s summary, its samples, and the seconds that it took."""
_RECORDED = ("metric", "value", "interval", "n", "episodes", "failures", "left_out", "samples")
EPISODES = 64
"""Held-out episodes where neither the task nor `eval.limit` says how many."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """A recipe's task with the files that it prepared in a folder."""

    recipe: Recipe
    folder: Path

    def prepare(self) -> None:
        """Write the files, once. `done.json` says that they are whole."""
        task = self.recipe.task
        if task is None:
            raise ConfigError("The recipe has no task to evaluate on; set task.name.")
        if (self.folder / DONE).exists():
            for split in (path.stem for path in self.folder.glob("*.jsonl")):
                self.path(split)  # one that changed is told, whether or not it is used again
            return
        began = time.perf_counter()
        echo(f"data: preparing {task.name}")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            files = get_task(task.name).prepare(task, self.recipe.run.seed, self.folder)
        except SystemExit as error:  # of an environment, which would end the run without a word
            raise ConfigError(
                f"The task {task.name} cannot be prepared: {describe_error(error)}."
            ) from None
        seconds = time.perf_counter() - began
        named = {k: str(v) for k, v in files.items()}
        digests = file_digests(
            self.folder, [p.name for p in files.values() if p.parent == self.folder]
        )
        done = {"files": named, "digests": digests, "seconds": seconds}
        write_sealed(self.folder / DONE, done)

    def path(self, split: str) -> Path:
        """The file of a split, whether or not the task writes one. Raises `StorageError` if it is
        not as it was prepared.
        """
        return prepared(self.folder, split)

    def rows(self, split: str) -> int | None:
        """How many rows the split has; None where the task draws episodes by their seed."""
        rows = self._load(split)
        return None if rows is None else len(rows)

    def collector(self, engine: Engine, split: str) -> Collector:
        """Episodes over the split's rows."""
        config, rl = self.recipe.task, self.recipe.rl
        assert config is not None
        task, path = get_task(config.name), self.path(split)
        make: Callable[[], TextEnvironment] = partial(task.make, config, path)
        processes = self.recipe.environment.processes
        return Collector(
            Separate(make) if processes else make,
            engine.tokenizer,
            engine,
            workers=processes or WORKERS,
            timeout=rl.episode_timeout if rl else EPISODE_TIMEOUT,
        )

    def unseen(self, split: Split, trained: Trained | None) -> list[int] | None:
        """The split's rows that nobody trained on; None where the task has no rows. Raises
        `DataError` if none is left.
        """
        rows = self._load(split)
        if rows is None or trained is None:
            return None if rows is None else list(range(len(rows)))
        left = trained.unseen(rows, self._task.cluster)
        if not left:
            raise DataError(
                f"{trained.run} trains on all {len(rows)} {split} rows, so they cannot tell how "
                "good it is; take the stages' data from task:labelled, or name other rows."
            )
        return left

    def evaluate(
        self,
        engine: Engine,
        name: str,
        to: Path,
        split: Split = "validation",
        trained: Trained | None = None,
    ) -> Record:
        """The policy's held-out record, made once and kept in `to`. Rows that were `trained` on
        are left out.
        """
        path = to / f"{name}.json"
        if path.exists():
            return read_record(path)
        config, limits, began = self.recipe.task, self.recipe.eval, time.perf_counter()
        rows, left = self._load(split), self.unseen(split, trained)
        episodes = getattr(config, split, EPISODES) if left is None else len(left)
        starts = starts_of(split, episodes, left)[: limits.limit]
        with (
            doing(f"while evaluating {name} on {split}"),
            Progress(len(starts), f"{split} {name}") as progress,
            engine.generating(),
            self.collector(engine, split) as collector,
        ):
            result = evaluate(
                collector,
                starts,
                limits.max_new_tokens,
                problems=None if rows is None else problems_of(rows, self._task.cluster),
                metric=getattr(config, "metric", self._task.metric),
                corpus=self._task.corpus,
                progress=lambda episodes, tokens: progress.advance(episodes, tokens=tokens),
            )
        seconds = time.perf_counter() - began
        skipped = 0 if rows is None or left is None else len(rows) - len(left)
        extra = {"split": split, "left_out": skipped, "seconds": seconds}
        record = {**result.summary(), **extra, "samples": result.samples}
        write_sealed(path, record)
        echo(f"{split} {name}: {told(record)}")
        return record

    @property
    def _task(self) -> Task:
        assert self.recipe.task is not None
        return get_task(self.recipe.task.name)

    def _load(self, split: str) -> Sequence[Mapping[str, Any]] | None:
        path = self.path(split)
        if path.exists():
            return load_rows(str(path))
        if split != "train" and self.path("train").exists():
            raise DataError(
                f"There is no file {path}: the data was prepared before there were three splits; "
                "evaluate the run with --recipe, or run it in another folder."
            )
        return None


def prepared(folder: Path, split: str) -> Path:
    """A file that a task prepared in the folder. Raises `StorageError` if it changed since."""
    path, done = folder / f"{split}.jsonl", folder / DONE
    anew = f"delete {folder}, and it is prepared anew."
    if done.exists():
        known = read_sealed(done, anew).get("digests", {})
        check_unchanged(folder, {n: m for n, m in known.items() if n == path.name}, anew)
    return path


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run has learned from."""

    run: Path
    """Its folder."""
    prompts: list[list[Message]]
    """What its rows ask."""
    clusters: frozenset[str]
    """The problems that rows of its task name."""

    def unseen(self, rows: Sequence[Mapping[str, Any]], column: str) -> list[int]:
        """The rows whose prompt and whose problem, named in `column`, are none of these."""
        keys = prompt_keys([*self.prompts, *map(_prompt_of, rows)])
        known = set(keys[: len(self.prompts)])
        return [
            i
            for i, (row, key) in enumerate(zip(rows, keys[len(self.prompts) :], strict=True))
            if not (key and key in known) and str(row.get(column)) not in self.clusters
        ]


def trained_on(run: Path, recipe: Recipe, begun: bool = True) -> Trained:
    """The rows of every stage that the run has begun, or (`begun=False`) of every stage that it
    has; and of the runs that it went on from. Raises `DataError` if a file of them is gone.
    """
    found, clusters = [], set()
    for name in STAGES:
        config = getattr(recipe, name)
        if config is None or (begun and not (run / name).is_dir()):
            continue
        data = config.supervised.data if name == "rl" else config.data
        known = made_from(run / name)
        for source in data.sources:
            label = path = source.path
            if path.startswith("task:"):
                path = str(prepared(run / "data", path.removeprefix("task:")))
                label = f"data/{Path(path).name}"
            was = known.get(label)
            try:
                if was and source_mark(path, source.split) != was:
                    raise StorageError(
                        f"{path} is not what {run / name} was made from; put it back as it was, or "
                        "choose another run.dir."
                    )
                rows = load_rows(path, source.split)[: source.limit]
            except DataError as error:
                if not begun:
                    raise
                raise DataError(
                    f"What {run} trained on is not known, so neither is what it has not seen: "
                    f"{error}"
                ) from None
            found += clean(rows, data.clean)[0]
        if name == "rl" and recipe.task and (path := prepared(run / "data", "train")).exists():
            rows, column = load_rows(str(path)), get_task(recipe.task.name).cluster
            found += rows
            clusters |= {str(row[column]) for row in rows if row.get(column) is not None}
    prompts = [prompt for row in found for prompt in asked(row)]
    before = run_of(Path(recipe.model.name).expanduser())
    if before and before.resolve() != run.resolve():
        earlier = trained_on(before, recipe_of(before))
        prompts, clusters = prompts + earlier.prompts, clusters | earlier.clusters
    return Trained(run, prompts, frozenset(clusters))


def made_from(stage: Path) -> Digests:
    """Digests of what a finished stage was made from; nothing of one that is not finished, or that
    an earlier version made.
    """
    done = stage / DONE
    anew = f"delete {stage} to do this stage again."
    return read_sealed(done, anew).get("made_from", {}) if done.exists() else {}


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or is a part of: a stage, its adapter, its average."""
    near = (folder, *folder.parents)[:3] if folder.is_dir() else ()
    return next((place for place in near if (place / "recipe.yaml").exists()), None)


def problems_of(rows: Sequence[Mapping[str, Any]], column: str) -> dict[int, int]:
    """The problem of each row: one for rows that name the same in `column`, or whose prompts are
    equal.
    """
    named = [i if row.get(column) is None else str(row[column]) for i, row in enumerate(rows)]
    texts = [prompt_text(_prompt_of(row)) or i for i, row in enumerate(rows)]
    return dict(enumerate(merged(named, texts)))


def _prompt_of(row: Mapping[str, Any]) -> list[Message]:
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def open_engine(recipe: Recipe, name: str | None, model: PreTrainedModel | None = None) -> Engine:
    """The engine of a recipe around a policy: a folder, a name, or (None) the recipe's model."""
    return Engine(
        model or load_policy(recipe.model, name),
        load_tokenizer(recipe.model, name),
        recipe.engine,
        seed=recipe.run.seed,
    )


def evaluate_run(
    run: str,
    recipe: Path | None,
    overrides: Sequence[str] = (),
    split: Split = "validation",
) -> tuple[str, dict[str, Record]]:
    """(title, records) of a run's policies, or of a model, on the rows of a split of `recipe`, None
    for the run's own. What was evaluated before is not again. Rows that the run trained on are left
    out, and counted.

    Records lie in the run's folder: in that of the split, or in `eval/<recipe>/<split>`; a model's
    lie in that of the recipe. Raises `ConfigError` if a model has no recipe, `DataError` if the run
    trained on every row, `FolderInUseError` if something is to be made while a run writes there.
    """
    folder = Path(run)
    whole = (folder / "recipe.yaml").exists()
    trained: Trained | None = None
    if recipe:
        data, to, trained = _on(load(Recipe, recipe, overrides), folder, whole)
    elif not whole:
        raise ConfigError(
            f"{run} is no run's folder, so what to evaluate it on is not known; name a recipe "
            "with --recipe."
        )
    elif overrides:
        raise ConfigError(
            "A run is evaluated as its own recipe says; to change that, add "
            f"--recipe {folder / 'recipe.yaml'}."
        )
    else:
        own = recipe_of(folder)
        data, to = TaskData(own, folder / "data"), folder
    policies = _policies(folder) if whole else {folder.name: run}
    to, made = to / split, to
    writes = not (data.folder / DONE).exists()
    writes |= not all((to / f"{name}.json").exists() for name in policies)
    home = folder if whole else Path(data.recipe.run.dir)
    with lock_run_folder(home) if writes else nullcontext():
        if recipe:
            claim(made, data.recipe)
        data.prepare()
        trained = trained or (trained_on(folder, data.recipe, begun=False) if whole else None)
        left, rows = data.unseen(split, trained), data.rows(split)
        if left is not None and rows is not None and len(left) < rows:
            echo(
                f"{split}: {rows - len(left)} of {rows} rows are left out, for {folder} trained "
                "on them"
            )
        for name, where in policies.items():
            if not (to / f"{name}.json").exists():
                if where is None:
                    claim_model(home, made_of(data.recipe.model.name))
                data.evaluate(open_engine(data.recipe, where), name, to, split, trained)
    return str(to), records(to)


def _on(recipe: Recipe, folder: Path, whole: bool) -> tuple[TaskData, Path, Trained | None]:
    """The held-out rows of another recipe for a run (`whole`), one of its stages or any model;
    where their records lie; and what the run trained on.
    """
    home, trained = run_of(folder), None
    if home:
        made = recipe_of(home)
        trained = trained_on(home, made)
        changes: dict[str, Any] = {"model": made.model}
        if made.task and recipe.task and made.task.name == recipe.task.name:
            # The seed makes the split: with another, rows of training would be held out.
            changes["run"] = recipe.run.model_copy(update={"seed": made.run.seed})
        recipe = recipe.model_copy(update=changes)
    at = Path(recipe.run.dir)
    to = (folder if whole else at) / "eval" / at.name
    recipe = dated(recipe, to)
    return TaskData(recipe, to / "data"), to, trained


def _policies(run: Path) -> dict[str, str | None]:
    """What a run's finished stages made, by name; the base model, None, is the first."""
    stages = [name for name in POLICIES if (run / name / DONE).exists()]
    return {"base": None, **{name: str(run / name) for name in stages}}


def told(record: Record) -> str:
    """The figure in words: `chrf 0.412 [0.395, 0.430] of 256 problems`."""
    episodes = "" if record["episodes"] == record["n"] else f" in {record['episodes']} episodes"
    failed = f", {record['failures']} failed" if record["failures"] else ""
    if record["left_out"]:
        failed += f"; {record['left_out']} rows left out that were trained on"
    return (
        f"{record['metric']} {record['value']:.3f} {span(record['interval'])} of {record['n']} "
        f"problems{episodes}{failed}"
    )


def records(folder: Path) -> dict[str, Record]:
    """The records in a folder, in the order of the stages, other policies after them."""
    found = {path.stem: read_record(path) for path in folder.glob("*.json")}
    order = ["base", *POLICIES]
    names = sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))
    return {name: found[name] for name in names}


def read_record(path: Path) -> Record:
    """A policy's held-out record. Raises `StorageError` if it is broken."""
    anew = "delete it: `gearshift eval` makes it anew."
    record = read_sealed(path, anew)
    if missing := [key for key in _RECORDED if key not in record]:
        raise StorageError(f"{path} is no held-out record (it has no `{missing[0]}`); {anew}")
    return record


def comparisons(found: Mapping[str, Record]) -> list[Comparison]:
    """Each policy with the one before it, and the last with the first."""
    names = list(found)
    pairs = [*pairwise(names)]
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    return [
        compare(
            (before, found[before]["samples"]),
            (after, found[after]["samples"]),
            found[after]["metric"],
        )
        for before, after in pairs
    ]


_FAILED = "(the environment failed)"


def changed(
    before: Record, after: Record, rows: Sequence[int], count: int
) -> Iterator[tuple[str, str, str]]:
    """(prompt, what was written before, and after) of these rows, the greatest changes first."""
    first = {s["row"]: s for s in before["samples"]}
    second = {s["row"]: s for s in after["samples"]}
    metric = after["metric"]

    def change(row: int) -> float:
        return abs(value_of(second[row], metric) - value_of(first[row], metric))

    for row in sorted(rows, key=change, reverse=True)[:count]:
        one, other = first[row], second[row]
        texts = [_FAILED if s["failed"] else s["completion"] for s in (one, other)]
        yield one["prompt"] or other["prompt"], texts[0], texts[1]


@torch.no_grad()
def perplexity(engine: Engine, episodes: Sequence[Mapping[str, Any]]) -> float:
    """exp of the mean negative log-probability, under the engine's model, of the tokens that the
    policy sampled in these episodes: an answer that was cut has no end token.

    Raises `DataError` where an episode's tokens were not kept.
    """
    if not all("token_ids" in episode for episode in episodes):
        raise DataError(
            "A held-out record of an earlier version has no tokens; delete it, and it is made anew."
        )
    batch = pack([(e["token_ids"], e["loss_mask"]) for e in episodes]).to(engine.device)
    total = count = 0.0
    for micro in batch.split(4096):
        with engine.training():
            logprobs_M = engine.logprobs(micro).logprobs
        total, count = total - float(logprobs_M.sum()), count + len(logprobs_M)
    return math.exp(total / max(count, 1))
