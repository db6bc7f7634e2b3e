"""Held-out evaluation of policies on a recipe's task. A run evaluates after each stage, and
`gearshift eval` any model: both keep the same records, `<policy>.json` in a folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch, pack
from gearshift.engine import Engine
from gearshift.errors import ConfigError, DataError
from gearshift.models.load import load_policy, load_tokenizer
from gearshift.models.made import DONE, made_of
from gearshift.pipeline.policy import find_policy
from gearshift.pipeline.provenance import Trained, run_of, trained_on
from gearshift.pipeline.recipe import (
    POLICIES,
    Recipe,
    recipe_of,
    record_model,
    record_recipe,
    with_date,
)
from gearshift.pipeline.records import Record, format_record, read_record, records
from gearshift.pipeline.task_data import EPISODES, TaskData, problems_of
from gearshift.rewards.composite import CompositeReward
from gearshift.rollouts.evaluate import Evaluation, Scorer, Split, evaluate, starts_of
from gearshift.runtime.config import load
from gearshift.runtime.digests import write_sealed
from gearshift.runtime.distributed import world
from gearshift.runtime.folder_lock import lock_run_folder
from gearshift.runtime.interrupt import doing
from gearshift.runtime.progress import Progress
from gearshift.runtime.terminal import counted, echo


def open_engine(
    recipe: Recipe,
    name: str | None,
    model: PreTrainedModel | None = None,
    recompute: bool | None = None,
    trained: bool = False,
) -> Engine:
    """The engine of a recipe around a policy: a folder, a name, or (None) the recipe's model.
    `recompute`, if it is given, stands in place of the recipe's. One that is `trained` and sampled
    by servers keeps no whole copy beside what is split over the ranks.
    """
    config = recipe.engine
    if recompute is not None:
        config = config.model_copy(update={"recompute": recompute})
    return Engine(
        model or load_policy(recipe.model, name),
        load_tokenizer(recipe.model, name),
        config,
        seed=recipe.run.seed,
        generates=not trained or recipe.generation.backend == "engine",
    )


def evaluate_policy(
    data: TaskData,
    engine: Engine,
    name: str,
    to: Path,
    split: Split = "validation",
    trained: Trained | None = None,
) -> Record:
    """The policy's held-out record, made once and kept in `to`. Rows that were `trained` on are
    left out.
    """
    path = to / f"{name}.json"
    if world().says(path.exists, "whether a policy was evaluated"):
        return read_record(path)
    began = time.perf_counter()
    rows, left = data.load(split), data.unseen(split, trained)
    result = measure(data, engine, name, split, left)
    seconds = time.perf_counter() - began
    skipped = 0 if rows is None or left is None else len(rows) - len(left)
    extra = {"split": split, "left_out": skipped, "seconds": seconds}
    record = {**result.summary(), **extra, "samples": result.samples}
    world().says(lambda: write_sealed(path, record), "a policy's record")
    echo(f"{split} {name}: {format_record(record)}")
    return record


def measure(
    data: TaskData,
    engine: Engine,
    name: str,
    split: Split,
    left: Sequence[int] | None,
    metric: str | None = None,
) -> Evaluation:
    """The policy's figures on the rows `left` of the split; None where the task has no rows.
    `metric` stands in place of the task's.
    """
    config, limits, rows = data.config, data.recipe.eval, data.load(split)
    episodes = getattr(config, split, EPISODES) if left is None else len(left)
    starts = starts_of(split, episodes, left)[: limits.limit]
    metric = metric or str(getattr(config, "metric", data.task.metric))
    with (
        _rewards(data, engine) as score,
        doing(f"while evaluating {name} on {split}"),
        Progress(len(starts), f"{split} {name}") as progress,
        data.collector(engine, split) as collector,
        collector.generating(),
    ):
        return evaluate(
            collector,
            starts,
            limits.max_new_tokens,
            problems=None if rows is None else problems_of(rows, data.task.cluster),
            metric=metric,
            corpus=data.task.corpus,
            progress=lambda episodes, tokens: progress.advance(episodes, tokens=tokens),
            score=score,
        )


@contextmanager
def _rewards(data: TaskData, engine: Engine) -> Iterator[Scorer | None]:
    """The recipe's rewards, which score held-out episodes if the environment has no reward; None if
    it has one.
    """
    if getattr(data.config, "reward", "") is not None:
        yield None
        return
    sources = data.recipe.rl.rewards if data.recipe.rl else ()
    if not sources:
        raise ConfigError("Nothing scores the answers: task.reward is null; name a reward.")
    folder = data.folder.parent / "reward"
    with closing(CompositeReward(sources, data.recipe.model, folder, engine.tokenizer)) as rewards:
        yield lambda trajectories: (rewards(trajectories)[0], rewards.last_failure)


def evaluate_run(
    run: str,
    recipe: Path | None,
    overrides: Sequence[str] = (),
    split: Split = "validation",
) -> tuple[str, dict[str, Record]]:
    """(title, records) of a run's policies, or of a model, on the rows of a split of `recipe`, None
    for the run's own. A policy that was evaluated before is not evaluated again. Rows that the run
    trained on are left out, and counted.

    Records lie in the run's folder: in that of the split, or in `eval/<recipe>/<split>`; a model's
    lie in that of the recipe. Raises `ConfigError` if a model has no recipe, `DataError` if the run
    trained on every row, `FolderInUseError` if something is to be made while a run writes there.
    """
    folder = Path(run)
    whole = (folder / "recipe.yaml").exists()
    if not whole:
        find_policy(run)  # raises if no such folder is there
    data, home, trained = _data_of(run, recipe, overrides)
    policies = _policies(folder) if whole else {folder.name: run}
    to = home / split
    writes = not (data.folder / DONE).exists()
    writes |= not all((to / f"{name}.json").exists() for name in policies)
    run_folder = folder if whole else Path(data.recipe.run.dir)
    with lock_run_folder(run_folder) if writes else nullcontext():
        if recipe:
            record_recipe(home, data.recipe)
        data.prepare()
        trained = trained or (trained_on(folder, data.recipe, begun=False) if whole else None)
        left, rows = data.unseen(split, trained), data.rows(split)
        if left is not None and rows is not None and len(left) < rows:
            echo(
                f"{split}: {rows - len(left)} of {counted(rows, 'row')} left out, for {folder} "
                "trained on them"
            )
        for name, where in policies.items():
            if not (to / f"{name}.json").exists():
                if where is None:
                    record_model(run_folder, made_of(data.recipe.model.name))
                engine = open_engine(data.recipe, where)
                evaluate_policy(data, engine, name, to, split, trained)
    return str(to), records(to)


def _data_of(
    run: str, recipe: Path | None, overrides: Sequence[str]
) -> tuple[TaskData, Path, Trained | None]:
    """The held-out rows for a run or a model, the folder of its records, and what the run trained
    on where another recipe is named.
    """
    folder = Path(run)
    if recipe:
        return _data_of_another(load(Recipe, recipe, overrides), folder)
    if not (folder / "recipe.yaml").exists():
        raise ConfigError(
            f"{run} is no run's folder, so what to evaluate it on is not known; name a recipe "
            "with --recipe."
        )
    if overrides:
        raise ConfigError(
            "A run is evaluated as its own recipe says; to change that, add "
            f"--recipe {folder / 'recipe.yaml'}."
        )
    return TaskData(recipe_of(folder), folder / "data"), folder, None


def _data_of_another(recipe: Recipe, folder: Path) -> tuple[TaskData, Path, Trained | None]:
    """The same for a recipe that is not the run's own."""
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
    to = (folder if (folder / "recipe.yaml").exists() else at) / "eval" / at.name
    recipe = with_date(recipe, to)
    return TaskData(recipe, to / "data"), to, trained


def _policies(run: Path) -> dict[str, str | None]:
    """The policies of a run's finished stages, by name; the base model, None, is the first."""
    stages = [name for name in POLICIES if (run / name / DONE).exists()]
    return {"base": None, **{name: str(run / name) for name in stages}}


@torch.no_grad()
def perplexity(engine: Engine, episodes: Sequence[Mapping[str, Any]]) -> float:
    """exp of the mean negative log-probability, under the engine's model, of the tokens that the
    policy sampled in these episodes: an answer that was cut has no end token.

    Raises `DataError` where an episode's tokens were not kept.
    """
    if not all("token_ids" in episode for episode in episodes):
        raise DataError(
            "A held-out record of an earlier version has no tokens; delete it, and it is made "
            "again."
        )
    batch = pack([(e["token_ids"], e["loss_mask"]) for e in episodes]).to(engine.device)

    def sums(micros: Sequence[PackedBatch]) -> list[tuple[float, int]]:
        with engine.training(), torch.no_grad():
            scored = [engine.logprobs(micro).logprobs for micro in micros]
        return [(float(logprobs_M.sum()), len(logprobs_M)) for logprobs_M in scored]

    parts = world().dealt(list(batch.split(4096, world().size)), sums)
    total, count = (sum(column) for column in zip(*parts, strict=True)) if parts else (0.0, 0)
    return math.exp(-total / max(count, 1))
