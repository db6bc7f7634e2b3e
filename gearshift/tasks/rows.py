"""Your own rows and your own reward function as a one-turn task; and how tasks keep their rows.

Here everything comes from the user, so each error names file and row. This file must not import
models or trainers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gearshift.data.check import check_source
from gearshift.data.clean import CleanConfig, clean
from gearshift.data.formats import to_prompt
from gearshift.data.overlap import near_duplicates, prompt_keys
from gearshift.data.rows import filled_columns
from gearshift.data.sources import SourceConfig, load_rows
from gearshift.environments.base import RowEnvironment
from gearshift.errors import ConfigError, DataError
from gearshift.rewards.build import load_reward
from gearshift.rewards.functions import RewardFunction
from gearshift.rollouts.intervals import merged
from gearshift.runtime.config import PathText
from gearshift.runtime.files import write_text
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import counted, echo
from gearshift.tasks.row_forms import has_answer, labelled_row
from gearshift.tasks.row_forms import prompt_row as prompt_row
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

Row = dict[str, Any]


class RowsConfig(TaskConfig):
    """Your own data: prompts, whatever else the reward function reads, and the function."""

    name: Literal["data"] = "data"
    """The name of the task."""
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Files or data sets with `prompt` (text or messages) and the reward's columns. Rows that have
    an answer too (`completion`, `messages`, ...) can be learned from as `task:labelled`. Each of
    several sources gives all its rows; a source with twice the least weight gives them twice."""
    validation: PathText | float = 0.1
    """A file of rows on which settings are compared; or the share of the prompts of `train` that is
    used for this."""
    test: PathText | float = 0.1
    """A file of rows that are evaluated once, at the end; or the share of the prompts of `train`
    that is used for this. Rows with the same value in a column `cluster`, or with equal prompts,
    are one problem, and no problem is in two splits."""
    reward: PathText | None = None
    """The environment's own reward, with TRL's signature: `file.py:function`,
    `package.module:function` or `http://...`. With null it has none; `rl.rewards` names the
    rewards, and they also measure held-out answers."""
    success_threshold: float | None = 1.0
    """The reward from which an answer counts as a success; null reports no success."""
    system: str | None = None
    """A system message that is added to every prompt without one."""
    clean: CleanConfig = CleanConfig()
    """How the rows of each source are cleaned."""


def write_rows(folder: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, Path]:
    """Write each split's rows to `<split>.jsonl` in the folder; returns the paths by split."""
    paths = {split: folder / f"{split}.jsonl" for split in files}
    for split, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(paths[split], "".join(lines))
    return paths


def read_rows(path: str | Path, *needed: str) -> Sequence[Row]:
    """A prepared file's rows, `prompt` and the columns that are needed in each.

    Raises `DataError` if the file is missing, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}; prepare the task's data first.")
    return _read(path, path.stat().st_mtime_ns, ("prompt", *needed))


@lru_cache(16)
def _read(path: Path, changed: int, needed: tuple[str, ...]) -> Sequence[Row]:
    """Read the file once for all environments; `changed` distinguishes the file's versions."""
    rows = load_rows(str(path))
    for row in rows:
        if missing := [column for column in needed if column not in row]:
            raise DataError(
                f"{path} has a row without `{missing[0]}`; prepare the task's data again."
            )
    return rows


def prepare(config: RowsConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages, of the rows of `train` that have an answer; if there are any
    train.jsonl           prompt, and every column for the reward
    validation.jsonl      the same
    test.jsonl            the same; no prompt and no `cluster` stands in two of the three

    Which rows of one file were left out because another file has their problem, and which prompts
    are nearly equal, is printed with an example. Raises `DataError` naming the file and the row
    that cannot be used, `ConfigError` if the reward cannot be loaded.
    """
    if config.reward:
        load_reward(config.reward)  # before any work is done
    least = min(source.weight for source in config.train)
    rows: list[Mapping[str, Any]] = []
    times: list[int] = []
    for source in config.train:
        found = _cleaned(source, config.clean)
        rows += found
        times += [max(1, round(source.weight / least))] * len(found)
    of_split: dict[str, list[Mapping[str, Any]]] = {"train": rows}
    for split in _HELDOUT:
        if isinstance(named := getattr(config, split), str):
            of_split[split] = [*_cleaned(SourceConfig(path=named), config.clean)]
    # Without the recipe's own system message, so that it is no part of what is asked.
    keys = _keys({split: [to_prompt(row).prompt for row in of_split[split]] for split in of_split})
    problems = _problems(of_split, keys)
    kept = _cut(config, problems, seed)
    _report_overlap(of_split, keys, problems, kept)
    files: dict[str, list[Row]] = {
        split: [prompt_row(of_split[source][i], config.system) for source, i in kept[split]]
        for split in _HELDOUT
    }
    trained = [(rows[i], prompt_row(rows[i], config.system), times[i]) for _, i in kept["train"]]
    files["train"] = [prompt for _, prompt, count in trained for _ in range(count)]
    labelled = [
        labelled_row(row, config.system)
        for row, _, count in trained
        if has_answer(row)
        for _ in range(count)
    ]
    if labelled:
        files["labelled"] = labelled
    return write_rows(folder, files)


_HELDOUT = ("validation", "test")
_Place = tuple[str, int]
"""A file, by the split that it is given for, and a row of it."""


def _cleaned(source: SourceConfig, config: CleanConfig) -> list[Row]:
    found, _ = clean(load_rows(source.path, source.split)[: source.limit], config)
    if not found:
        raise DataError(f"{source.path} has no rows left once cleaned; see task.clean.")
    return found


def _keys(prompts: Mapping[str, Sequence[Sequence[Message]]]) -> dict[str, list[str]]:
    """The prompt of each row of each file, as a text."""
    together = iter(prompt_keys([p for of_file in prompts.values() for p in of_file]))
    return {split: [next(together) for _ in of_file] for split, of_file in prompts.items()}


def _problems(
    of_split: Mapping[str, Sequence[Mapping[str, Any]]], keys: Mapping[str, Sequence[str]]
) -> dict[str, list[int]]:
    """Each row's problem. Rows with the same prompt or the same `cluster` are one problem."""
    named = [filled_columns(row).get("cluster") for of_file in of_split.values() for row in of_file]
    clusters = [i if name is None else str(name) for i, name in enumerate(named)]
    together = iter(merged(clusters, [key for of_file in keys.values() for key in of_file]))
    return {split: [next(together) for _ in of_file] for split, of_file in keys.items()}


def _cut(
    config: RowsConfig, problems: Mapping[str, Sequence[int]], seed: int
) -> dict[str, list[_Place]]:
    """The rows of each split. A problem that is in several files stays in the test's, else in
    validation's. Raises `DataError` if nothing is left for one of the splits.
    """
    kept: dict[str, list[_Place]] = {}
    held: set[int] = set()
    for split in reversed(_HELDOUT):
        if split in problems:
            kept[split] = [(split, i) for i, p in enumerate(problems[split]) if p not in held]
            held |= set(problems[split])
    free = [p for p in dict.fromkeys(problems["train"]) if p not in held]
    # Validation comes first, so a file for the test does not change the share for validation.
    shares = {s: getattr(config, s) for s in _HELDOUT if s not in kept}
    drawn = random.Random(named_seed(seed, "data/heldout")).sample(free, len(free))
    for split, share in shares.items():
        if not 0 < share < 1 or sum(shares.values()) >= 1:
            raise ConfigError(
                f"task.{split} is {share}; give a share between 0 and 1, or a file; the shares "
                "must leave something to train on."
            )
        count = max(1, round(share * len(free)))
        mine, drawn = set(drawn[:count]), drawn[count:]
        kept[split] = [("train", i) for i, p in enumerate(problems["train"]) if p in mine]
        held |= mine
    kept["train"] = [("train", i) for i, p in enumerate(problems["train"]) if p not in held]
    for split, places in kept.items():
        if not places:
            raise DataError(
                f"No row is left for {split}: every prompt or cluster of it is held out for "
                "another split; give more rows."
            )
    return kept


def _report_overlap(
    of_split: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Mapping[str, Sequence[str]],
    problems: Mapping[str, Sequence[int]],
    kept: Mapping[str, Sequence[_Place]],
) -> None:
    """Print what was left out of a file because another has it, and what is nearly equal."""

    def where(place: _Place) -> str:
        return getattr(of_split[place[0]][place[1]], "where", "a row")

    def first(split: str, of: Mapping[str, Sequence[Any]]) -> dict[Any, _Place]:
        """The first place in the split of each prompt, or of each problem."""
        return {of[file][i]: (file, i) for file, i in reversed(kept[split])}

    for split, other in (("validation", "test"), ("train", "test"), ("train", "validation")):
        if other in keys:  # a file of its own, whose rows were not taken out of this one
            theirs, mine = first(other, problems), problems.get(split, ())
            if equal := [i for i, problem in enumerate(mine) if problem in theirs]:
                one, place = (split, equal[0]), theirs[mine[equal[0]]]
                echo(
                    f"data: {counted(len(equal), 'row')} left out of {split}, because {other} has "
                    f"their prompts or clusters; for example {where(one)} is like {where(place)}"
                )
        texts, others = first(split, keys), first(other, keys)
        if pairs := list(near_duplicates([*texts], [*others])):
            i, j = pairs[0]
            echo(
                f"data: {split} and {other} share nearly equal prompts, which stay in both "
                f"({len(pairs)} in {split}); for example {where([*texts.values()][i])} and "
                f"{where([*others.values()][j])}"
            )


class RowsEnvironment(RowEnvironment):
    """One prompt, one answer, scored by the user's function. `info` holds the row's columns."""

    def __init__(
        self,
        path: str | Path,
        reward: str | RewardFunction | None,
        success_threshold: float | None = 1.0,
    ) -> None:
        """Use the rows of a prepared JSONL file. Raises `DataError`, `ConfigError`."""
        score = _loaded(reward) if isinstance(reward, str) else reward or _no_reward
        super().__init__(read_rows(path), score)
        self.threshold = success_threshold

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        """`success`, if there is a threshold, and `gold`, if the row has it."""
        info = {} if self.threshold is None else {"success": reward >= self.threshold}
        gold = row.get("completion", row.get("answer"))
        return {**info, "gold": str(gold)} if isinstance(gold, str | int | float) else info


def _no_reward(
    prompts: list[list[Message]], completions: list[str], **columns: Any
) -> list[float | None]:
    return [None] * len(completions)


def _loaded(reward: str) -> RewardFunction:
    """The function; its file runs once for all environments, until it changes."""
    file = Path(reward.rpartition(":")[0])
    return _from_file(reward, file.stat().st_mtime_ns) if file.is_file() else load_reward(reward)


@lru_cache(16)
def _from_file(reward: str, changed: int) -> RewardFunction:
    return load_reward(reward)


def make(config: RowsConfig, path: Path) -> RowsEnvironment:
    return RowsEnvironment(path, config.reward, config.success_threshold)


def check(config: RowsConfig) -> None:
    """Raises `GearshiftError` for a reward, a file or one of its first rows that cannot be used."""
    if config.reward:
        load_reward(config.reward)
    heldout = [getattr(config, split) for split in _HELDOUT]
    files = [SourceConfig(path=named) for named in heldout if isinstance(named, str)]
    for source in (*config.train, *files):
        check_source(source, config.clean, partial(prompt_row, system=config.system))


TASK = Task("data", RowsConfig, prepare, make, check=check, metric="reward")
