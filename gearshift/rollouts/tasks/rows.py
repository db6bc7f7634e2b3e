"""Your own rows and your own reward function as a one-turn task; and how tasks keep their rows.

A room of its own because here everything comes from the user: each fault is told by file and row.
It knows texts, files and a reward's name, no model and no trainer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gearshift.data.clean import CleanConfig, clean
from gearshift.data.formats import ChatExample, given, to_prompt, to_supervised
from gearshift.data.messages import ROLES
from gearshift.data.sources import SourceConfig, load_rows
from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.environment import RowEnvironment
from gearshift.rollouts.rewards import RewardFunction, load_reward
from gearshift.rollouts.tasks.task import Task
from gearshift.runtime.config import Config, PathText
from gearshift.runtime.seeding import named_seed
from gearshift.types import Message

Row = dict[str, Any]


class RowsConfig(Config):
    """Your own data: prompts, whatever else the reward function reads, and the function."""

    name: Literal["data"] = "data"
    """Which task this is."""
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Files or data sets with `prompt` (text or messages) and the reward's columns. Rows that have
    an answer too (`completion`, `messages`, ...) can be learned from as `task:labelled`. Of several
    sources each gives all its rows; one of twice the least weight gives them twice."""
    heldout: PathText | float = 0.1
    """A file of held-out rows; or the share of `train` that is held out."""
    reward: PathText
    """The environment's own reward, with TRL's signature: `file.py:function`,
    `package.module:function` or `http://...`."""
    success_threshold: float | None = 1.0
    """The reward from which an answer counts as a success; null: success is not told."""
    system: str | None = None
    """A system message put before every prompt that has none."""
    clean: CleanConfig = CleanConfig()
    """Applied to each source."""


def write_rows(folder: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, Path]:
    """Write each split's rows to `<split>.jsonl` in the folder; returns the paths by split."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in files}
    for split, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        paths[split].write_text("".join(lines), encoding="utf-8")
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
    """Once for all environments side by side; `changed` tells a file's versions apart."""
    rows = load_rows(str(path))
    for row in rows:
        if missing := [column for column in needed if column not in row]:
            raise DataError(
                f"{path} has a row without `{missing[0]}`; prepare the task's data anew."
            )
    return rows


# The data


def prepare(config: RowsConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages, of the rows of `train` that have an answer; if there are any
    train.jsonl           prompt, and every column for the reward
    heldout.jsonl         the same; no prompt of it stands in the other files

    Raises `DataError` naming the file and the row that cannot be used, `ConfigError` if the reward
    cannot be loaded.
    """
    load_reward(config.reward)  # before any work is done
    rows: list[Mapping[str, Any]] = []
    for source in config.train:
        found, _ = clean(load_rows(source.path, source.split)[: source.limit], config.clean)
        if not found:
            raise DataError(f"{source.path} has no rows left once cleaned; see task.clean.")
        rows += found * max(1, round(source.weight / min(s.weight for s in config.train)))
    prompts = [_prompt_row(row, config.system) for row in rows]
    if isinstance(config.heldout, str):
        found, _ = clean(load_rows(config.heldout), config.clean)
        heldout = [_prompt_row(row, config.system) for row in found]
        if not heldout:
            raise DataError(f"{config.heldout} has no rows left once cleaned; see task.clean.")
    else:
        heldout = _share(prompts, config.heldout, seed)
    unseen = {_key(row) for row in heldout}
    kept = [i for i, row in enumerate(prompts) if _key(row) not in unseen]
    if not kept:
        raise DataError("No row is left to train on: every prompt of task.train is held out.")
    files: dict[str, list[Row]] = {"train": [prompts[i] for i in kept], "heldout": heldout}
    labelled = [_labelled(rows[i], config.system) for i in kept if _has_answer(rows[i])]
    if labelled:
        files["labelled"] = labelled
    return write_rows(folder, files)


def _share(prompts: Sequence[Row], share: float, seed: int) -> list[Row]:
    """This share of the different prompts, a row each; in the order of the file."""
    if not 0 < share < 1:
        raise ConfigError(f"task.heldout is {share}; give a share between 0 and 1, or a file.")
    first = {_key(row): row for row in reversed(prompts)}
    keys = list(dict.fromkeys(map(_key, prompts)))
    count = max(1, round(share * len(keys)))
    chosen = set(random.Random(named_seed(seed, "data/heldout")).sample(range(len(keys)), count))
    return [first[key] for i, key in enumerate(keys) if i in chosen]


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)


def _prompt_row(row: Mapping[str, Any], system: str | None) -> Row:
    example = to_prompt(row)
    for column, value in example.columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise DataError(
                f"{getattr(row, 'where', 'A row')}: `{column}` is a {type(value).__name__}, which "
                "JSON cannot hold; make it a text or a number."
            ) from None
    return {
        **example.columns,
        "prompt": _with_system(example.prompt, system),
        **_options(example.options),
    }


def _has_answer(row: Mapping[str, Any]) -> bool:
    """Whether the row says what to answer."""
    row = given(row)
    if "prompt" in row:
        return "completion" in row
    turns = row.get("messages") or row.get("conversations") or [{}]
    who = turns[-1].get("role", turns[-1].get("from"))
    return "output" in row or ROLES.get(who) == "assistant"


def _labelled(row: Mapping[str, Any], system: str | None) -> Row:
    example = to_supervised(row)
    assert isinstance(example, ChatExample)  # the row has a prompt
    messages = [
        {**message, "train": False} if i in example.untrained else message
        for i, message in enumerate(example.messages)
    ]
    return {"messages": _with_system(messages, system), **_options(example.options)}


def _options(options: Mapping[str, Any]) -> Row:
    """As the columns that they came from."""
    rest = {name: value for name, value in options.items() if name != "tools"}
    columns = {"tools": options.get("tools"), "chat_template_kwargs": rest}
    return {name: value for name, value in columns.items() if value}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


# The environment


class RowsEnvironment(RowEnvironment):
    """One prompt, one answer, scored by the user's function. `info` holds the row's columns."""

    def __init__(
        self,
        path: str | Path,
        reward: str | RewardFunction,
        success_threshold: float | None = 1.0,
    ) -> None:
        """Over the rows of a prepared JSONL file. Raises `DataError`, `ConfigError`."""
        score = _loaded(reward) if isinstance(reward, str) else reward
        super().__init__(read_rows(path), score)
        self.threshold = success_threshold

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        """`success`, where a threshold says what it is, and `gold`, where the row has it."""
        said: dict[str, Any] = {}
        if self.threshold is not None:
            said["success"] = reward >= self.threshold
        gold = row.get("completion", row.get("answer"))
        if isinstance(gold, str | int | float):
            said["gold"] = str(gold)
        return said


# A file is run once for all environments side by side, so that what it keeps is kept.
_loaded = lru_cache(16)(load_reward)


def _make(config: RowsConfig, path: Path) -> RowsEnvironment:
    return RowsEnvironment(path, config.reward, config.success_threshold)


TASK = Task("data", RowsConfig, prepare, _make, metric="reward")
