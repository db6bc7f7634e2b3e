"""Verifiable reasoning: questions that `reasoning-gym` makes, answers that its own scorers judge.

This file has the environment and the data; the scorers are in `scores.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime import tagged_json
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.reasoning.scores import Format, make_dataset, reasoning_reward
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig

Row = dict[str, Any]
SYSTEM: dict[Format, str] = {
    "whole": "Write the answer and nothing else.",
    "tagged": "Think first, then write the answer between <answer> and </answer>.",
}

_TRIES = 40
"""How many questions are tried for each one that is wanted, before a generator counts as exhausted.
"""


class ReasoningConfig(TaskConfig):
    """Which questions, and how many of them."""

    name: Literal["reasoning"] = "reasoning"
    """The name of the task."""
    dataset: str | tuple[str, ...] = "chain_sum"
    """A generator of reasoning-gym, or several generators, which make equally many rows."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The generator's own options; for several generators, a mapping from each generator's name to
    its options."""
    answer: Format = "whole"
    """Which part of a completion is the answer: `whole` is all of it, `tagged` is the text in
    <answer> ... </answer>."""
    labelled: int = Field(default=64, ge=0)
    """How many questions with an answer there are for supervised fine-tuning; a few generators
    cannot give answers."""
    train: int = Field(default=2000, ge=1)
    """How many questions there are for reinforcement learning."""
    validation: int = Field(default=256, ge=1)
    """How many questions there are for validation; they are in no other split."""
    test: int = Field(default=256, ge=1)
    """How many questions there are for the test; they are in no other split."""

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Each generator's options."""
        if isinstance(self.dataset, str):
            return {self.dataset: self.options}
        return {name: self.options.get(name, {}) for name in self.dataset}


class ReasoningEnvironment(RowEnvironment):
    """One question, one answer. Success: the generator's scorer gives 1."""

    def __init__(
        self,
        path: str | Path | None = None,
        seed: int = 0,
        rows: int = 64,
        dataset: str = "chain_sum",
    ) -> None:
        """Use the rows of a JSONL file, or `rows` questions of `dataset` that `seed` draws.

        Raises `DataError` if the file or reasoning-gym is missing, `ConfigError` if there is no
        such dataset.
        """
        super().__init__(
            _sampled(dataset, seed, rows) if path is None else read_rows(path, "dataset", "entry"),
            reasoning_reward,
        )

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        success = reward >= 1.0
        return {
            "success": success,
            "gold": row["gold"],
            "metrics": {f"success/{row['dataset']}": float(success)},
        }


@lru_cache(4)
def _sampled(dataset: str, seed: int, rows: int) -> Sequence[Row]:
    config = ReasoningConfig(dataset=dataset)
    return _questions(config, named_seed(seed, "reasoning/rows"), "rows", rows, set())


def by_dataset(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The success rate on each generator's questions."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample["metrics"].items():
            values.setdefault(name, []).append(value)
    return {name: fmean(found) for name, found in values.items()}


def prepare(config: ReasoningConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages (system, the question, a right answer)
    train.jsonl           prompt, and what the scorer needs
    validation.jsonl      the same
    test.jsonl            the same; no question stands in two files

    Raises `DataError` if a generator has not as many different questions, or no right answers to
    learn from; `ConfigError` if there is no such generator or option.
    """
    used: set[str] = set()
    found = {
        split: _questions(config, named_seed(seed, f"reasoning/{split}"), split, count, used)
        for split, count in (
            ("validation", config.validation),
            ("labelled", config.labelled),
            ("train", config.train),
            ("test", config.test),
        )
    }
    labelled = found.pop("labelled")
    files = {**found, "labelled": [_labelled(row) for row in labelled]} if labelled else found
    return write_rows(folder, files)


def _questions(
    config: ReasoningConfig, seed: int, split: str, count: int, used: set[str]
) -> list[Row]:
    """`count` rows, generator after generator, of questions that are not in `used`, to which they
    are added.
    """
    names = list(config.datasets)
    columns = []
    for i, name in enumerate(names):
        share = count // len(names) + (i < count % len(names))
        rows = list(islice(_rows(config, name, seed, share, used), share))
        if len(rows) < share:
            raise DataError(
                f"{name} gave {len(rows)} different questions for {split}={count}; ask for fewer, "
                "or widen task.options."
            )
        if split == "labelled" and any(row["gold"] is None for row in rows):
            raise DataError(
                f"{name} has no right answer to learn from; leave it out of task.dataset, or set "
                "task.labelled=0 and sft=null."
            )
        columns.append(rows)
    return [row for rows in zip_longest(*columns) for row in rows if row is not None]


def _rows(
    config: ReasoningConfig, name: str, seed: int, share: int, used: set[str]
) -> Iterator[Row]:
    options, size = config.datasets[name], max(1, share * _TRIES)
    # A generator draws row i from its seed + i. Some pass that to NumPy, which takes 32 bits.
    dataset = make_dataset(name, options, named_seed(seed, name) % 2**31, size)
    for i in range(size):
        entry = dataset[i]
        question = entry["question"].strip()
        if question in used:
            continue
        used.add(question)
        yield {
            "prompt": [
                {"role": "system", "content": SYSTEM[config.answer]},
                {"role": "user", "content": question},
            ],
            "dataset": name,
            "options": options,
            "form": config.answer,
            "gold": _gold(dataset, entry),
            "entry": tagged_json.encode(entry),
        }


def _gold(dataset: Any, entry: Mapping[str, Any]) -> str | None:
    """An answer that the scorer accepts: the entry's, or an example in its metadata."""
    examples = [v for k, v in entry["metadata"].items() if "answer" in k or "solution" in k]
    for answer in (entry["answer"], *examples):
        answer = json.dumps(answer) if isinstance(answer, dict) else answer
        try:
            if isinstance(answer, str) and dataset.score_answer(answer, entry) >= 1.0:
                return answer
        except Exception:  # it was not an answer
            continue
    return None


def _labelled(row: Row) -> Row:
    answer = row["gold"] if row["form"] == "whole" else f"<answer>{row['gold']}</answer>"
    return {"messages": [*row["prompt"], {"role": "assistant", "content": answer}]}


def make(config: ReasoningConfig, path: Path) -> ReasoningEnvironment:
    """The environment over the rows of `path`."""
    return ReasoningEnvironment(path)


register("gearshift/Reasoning-v0", ReasoningEnvironment)
TASK = Task(
    "reasoning",
    ReasoningConfig,
    prepare,
    make,
    SYSTEM["whole"],
    corpus=by_dataset,
)
