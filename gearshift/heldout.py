"""Held-out evaluation of policies on a recipe's task, and what their figures say side by side.

Its own room because a run does it after each stage and `gearshift eval` for any model: both keep
the same records, `<policy>.json` in a folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gearshift.data import load_rows, pack, render_supervised
from gearshift.engine import HybridEngine
from gearshift.errors import ConfigError
from gearshift.models.load import load_policy, load_tokenizer
from gearshift.recipe import POLICIES, Recipe, claim, dated
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.evaluate import Comparison, compare, evaluate, value_of
from gearshift.rollouts.tasks import get_task
from gearshift.runtime.config import load
from gearshift.runtime.files import write_json
from gearshift.runtime.progress import Progress
from gearshift.types import Message

Record = dict[str, Any]
"""An `Evaluation`'s summary, its samples, and the seconds that it took."""
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
        if (self.folder / "done.json").exists():
            return
        began = time.perf_counter()
        print(f"data: preparing {task.name}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        files = get_task(task.name).prepare(task, self.recipe.run.seed, self.folder)
        seconds = time.perf_counter() - began
        named = {k: str(v) for k, v in files.items()}
        write_json(self.folder / "done.json", {"files": named, "seconds": seconds})

    def path(self, split: str) -> Path:
        """The file of a split, whether or not the task writes one."""
        return self.folder / f"{split}.jsonl"

    def rows(self, split: str) -> int | None:
        """How many rows the split has; None where the task draws episodes by their seed."""
        path = self.path(split)
        return len(load_rows(str(path))) if path.exists() else None

    def collector(self, engine: HybridEngine, split: str) -> Collector:
        """Episodes over the split's rows."""
        config, rl = self.recipe.task, self.recipe.rl
        assert config is not None
        task, path = get_task(config.name), self.path(split)
        return Collector(
            lambda: task.make(config, path),
            engine.tokenizer,
            engine,
            timeout=rl.episode_timeout if rl else None,
        )

    def evaluate(self, engine: HybridEngine, name: str, to: Path) -> Record:
        """The policy's held-out record, made once and kept in `to`."""
        path = to / f"{name}.json"
        if path.exists():
            kept: Record = json.loads(path.read_text(encoding="utf-8"))
            return kept
        config, limits = self.recipe.task, self.recipe.eval
        assert config is not None
        task, began = get_task(config.name), time.perf_counter()
        rows = self.rows("heldout")
        episodes = getattr(config, "heldout", EPISODES) if rows is None else rows
        episodes = min(episodes, limits.limit or episodes)
        with Progress(episodes, f"held-out {name}") as progress, engine.generating():
            result = evaluate(
                self.collector(engine, "heldout"),
                episodes,
                limits.max_new_tokens,
                by_row=rows is not None,
                metric=getattr(config, "metric", task.metric),
                corpus=task.corpus,
                progress=lambda episodes, tokens: progress.advance(episodes, tokens=tokens),
            )
        seconds = time.perf_counter() - began
        record = {**result.summary(), "seconds": seconds, "samples": result.samples}
        to.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        print(f"held-out {name}: {told(record)}", flush=True)
        return record


def open_engine(
    recipe: Recipe, name: str | None, model: PreTrainedModel | None = None
) -> HybridEngine:
    """The engine of a recipe around a policy: a folder, a name, or (None) the recipe's model."""
    return HybridEngine(
        model or load_policy(recipe.model, name),
        load_tokenizer(recipe.model, name),
        recipe.engine,
        seed=recipe.run.seed,
    )


def evaluate_run(
    run: str,
    recipe: Path | None,
    overrides: Sequence[str] = (),
) -> tuple[str, dict[str, Record]]:
    """(title, records) of a run's policies, or of a model, on the held-out rows of `recipe`, None
    for the run's own. What was evaluated before is not again.

    Records lie in the run's folder: `heldout`, or `eval/<recipe>`; a model's lie in that of the
    recipe. Raises `ConfigError` if a model has no recipe.
    """
    folder = Path(run)
    whole = (folder / "recipe.yaml").exists()
    if recipe:
        data, to = _on(load(Recipe, recipe, overrides), folder, whole)
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
        own = load(Recipe, folder / "recipe.yaml")
        data, to = TaskData(own, folder / "data"), folder / "heldout"
    data.prepare()
    policies = _policies(folder) if whole else {folder.name: run}
    for name, where in policies.items():
        if not (to / f"{name}.json").exists():
            data.evaluate(open_engine(data.recipe, where), name, to)
    return str(to), records(to)


def _on(recipe: Recipe, folder: Path, whole: bool) -> tuple[TaskData, Path]:
    """The held-out rows of another recipe for a run (`whole`), one of its stages or any model; and
    where their records lie.
    """
    home = folder if whole else folder.parent
    if (home / "recipe.yaml").exists():
        made = load(Recipe, home / "recipe.yaml")
        changes: dict[str, Any] = {"model": made.model}
        if made.task and recipe.task and made.task.name == recipe.task.name:
            # The seed makes the split: with another, rows of training would be held out.
            changes["run"] = recipe.run.model_copy(update={"seed": made.run.seed})
        recipe = recipe.model_copy(update=changes)
    at = Path(recipe.run.dir)
    to = (folder if whole else at) / "eval" / at.name
    recipe = dated(recipe, to)
    claim(to, recipe)
    return TaskData(recipe, to / "data"), to


def _policies(run: Path) -> dict[str, str | None]:
    """What a run's finished stages made, by name; the base model, None, is the first."""
    stages = [name for name in POLICIES if (run / name / "done.json").exists()]
    return {"base": None, **{name: str(run / name) for name in stages}}


def told(record: Record) -> str:
    """The figure in words: `chrf 0.412 [0.395, 0.430] of 256`."""
    low, high = record["interval"]
    return f"{record['metric']} {record['value']:.3f} [{low:.3f}, {high:.3f}] of {record['n']}"


def records(folder: Path) -> dict[str, Record]:
    """The records in a folder, in the order of the stages, other policies after them."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    order = ["base", *POLICIES]
    names = sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))
    return {name: found[name] for name in names}


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
        yield first[row]["prompt"], first[row]["completion"], second[row]["completion"]


@torch.no_grad()
def perplexity(engine: HybridEngine, conversations: Sequence[Sequence[Message]]) -> float:
    """exp of the mean negative log-probability, under the engine's model, of the tokens that the
    assistant wrote in these conversations.
    """
    batch = pack([render_supervised(engine.tokenizer, m) for m in conversations])
    batch = batch.to(engine.device)
    total = count = 0.0
    for micro in batch.split(4096):
        with engine.training():
            logprobs_M = engine.logprobs(micro).logprobs
        total, count = total - float(logprobs_M.sum()), count + len(logprobs_M)
    return math.exp(total / max(count, 1))
