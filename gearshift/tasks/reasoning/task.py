"""Verifiable reasoning: questions that `reasoning-gym` makes, answers that its own scorers judge.

A room of its own because all that this task asks of a model stands here; it knows no model and no
trainer. Some of those scorers run an answer as Python: what may reach them is decided here.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import ConfigError, DataError
from gearshift.rewards.completion_text import without_thoughts
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

Row = dict[str, Any]
Format = Literal["whole", "tagged"]

SYSTEM: dict[Format, str] = {
    "whole": "Write the answer and nothing else.",
    "tagged": "Think first, then write the answer between <answer> and </answer>.",
}

# Scorers that run what they are given as Python: as a list, or through sympy as a formula.
_RUN_AS_LIST = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
_RUN_AS_FORMULA = {
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24",
    "simple_integration",
}  # fmt: skip
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "Abs"}
_FORMULA = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd,
)  # fmt: skip
# Questions that are tried for each one that is wanted, before a generator counts as exhausted.
_TRIES = 40


class ReasoningConfig(TaskConfig):
    """Which questions, and how many of them."""

    name: Literal["reasoning"] = "reasoning"
    """Which task this is."""
    dataset: str | tuple[str, ...] = "chain_sum"
    """A generator of reasoning-gym, or several that share the rows equally."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The generator's own options; of several generators, options by generator."""
    answer: Format = "whole"
    """What of a completion is the answer: all of it, or what stands in <answer> ... </answer>."""
    labelled: int = Field(64, ge=0)
    """Questions with their answers, for supervised fine-tuning; a few generators know none."""
    train: int = Field(2000, ge=1)
    """Questions for reinforcement learning."""
    validation: int = Field(256, ge=1)
    """Questions that stand in no other file."""
    test: int = Field(256, ge=1)
    """The same."""

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Each generator's options."""
        if isinstance(self.dataset, str):
            return {self.dataset: self.options}
        return {name: self.options.get(name, {}) for name in self.dataset}


# Questions and scores


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "The task reasoning needs reasoning-gym; pip install 'gearshift[reasoning]'."
        ) from None
    return reasoning_gym


def dataset_names() -> list[str]:
    """The generators there are. Raises `DataError` if reasoning-gym is not installed."""
    _library()
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})  # which is what a list of generators is here


def make_dataset(name: str, options: Mapping[str, Any], seed: int = 0, size: int = 1) -> Any:
    """The generator with these options. Raises `ConfigError` if it has none such."""
    names = dataset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "see reasoning_gym.factory.DATASETS."
        raise ConfigError(f"task.dataset: reasoning-gym has no generator `{name}`; {hint}")
    try:
        return _library().create_dataset(name, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        words = re.sub(r"^\S*__init__\(\) ", "", str(error)).rstrip(".")
        raise ConfigError(f"task.options of {name}: {words}.") from None


@lru_cache(128)
def _scorer(name: str, options: str) -> Any:
    return make_dataset(name, json.loads(options))


def score(row: Mapping[str, Any], answer: str) -> float | None:
    """What the generator says of an answer, at most 1; 0 for one that its scorer cannot read, None
    where the scorer fails on the right answer too.

    An answer that a scorer would run as Python gets there only as a plain list or a formula.
    """
    name, entry = row["dataset"], thaw(row["entry"])
    scorer = _scorer(name, json.dumps(row["options"]))
    if not _harmless(name, answer):
        return 0.0
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:  # a scorer may raise anything over a text that it does not expect
        try:
            scorer.score_answer(entry["answer"], entry)
        except Exception:
            return None
        return 0.0


def _harmless(name: str, answer: str) -> bool:
    """Whether the generator's scorer may have this answer."""
    if name in _RUN_AS_LIST and re.fullmatch(r"[\w\s]*", answer):  # a board drawn in letters
        return True
    if name not in _RUN_AS_LIST | _RUN_AS_FORMULA:
        return True
    try:
        if name in _RUN_AS_LIST:
            return isinstance(ast.literal_eval(answer), list)
        tree = ast.parse(answer.strip().replace("^", "**"), mode="eval")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return len(answer) <= 300 and all(map(_plain, ast.walk(tree)))


def _plain(node: ast.AST) -> bool:
    """A number, a short name, a known function or an operation; and no power that grows large."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) <= 1e12
    if isinstance(node, ast.Name):
        return len(node.id) <= 2 or node.id in _FUNCTIONS
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return known and len(node.args) == 1 and not node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        most = 99 if isinstance(node.left, ast.Name) else 9
        inner = sum(isinstance(n, ast.Pow) for n in ast.walk(node.left))
        return inner <= 3 and _small(node.right, most)
    return isinstance(node, _FORMULA)


def _small(exponent: ast.AST, most: int) -> bool:
    """A whole number or a ratio of two, its sign before it, none of them above `most`."""
    if isinstance(exponent, ast.UnaryOp):
        return _small(exponent.operand, most)
    if isinstance(exponent, ast.BinOp):
        parts = (exponent.left, exponent.right)
        return isinstance(exponent.op, ast.Div) and all(_small(part, most) for part in parts)
    return isinstance(exponent, ast.Constant) and exponent.value in range(most + 1)


def read_answer(completion: str, form: Format) -> str:
    """The answer in a completion; empty where the tags are missing, or only its thoughts have
    them.
    """
    if form == "whole":
        return completion.strip()
    said = without_thoughts(completion)
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", said, flags=re.DOTALL)
    return found[-1].strip() if found else ""


def reasoning_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    *,
    form: list[Format],
    **columns: Any,
) -> list[float | None]:
    """`score` with TRL's signature."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        score(row, read_answer(text, kind))
        for row, text, kind in zip(rows, completions, form, strict=True)
    ]


def freeze(value: Any) -> Any:
    """As JSON can keep it: tuples and dictionaries, whose keys may be numbers, are marked."""
    if isinstance(value, tuple):
        return {"tuple": [freeze(v) for v in value]}
    if isinstance(value, list):
        return [freeze(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[freeze(k), freeze(v)] for k, v in value.items()]}
    return value


def thaw(value: Any) -> Any:
    """What `freeze` was given."""
    if isinstance(value, list):
        return [thaw(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(thaw(v) for v in value["tuple"])
    return {thaw(k): thaw(v) for k, v in value["dict"]}


# The environment


class ReasoningEnvironment(RowEnvironment):
    """A question, an answer. Success: the generator's scorer gives it all, 1."""

    def __init__(
        self,
        path: str | Path | None = None,
        seed: int = 0,
        rows: int = 64,
        dataset: str = "chain_sum",
    ) -> None:
        """Over the rows of a JSONL file, or over `rows` questions of `dataset` that `seed` draws.

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


# The data


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
                f"{name} says no right answer to learn from; leave it out of task.dataset, or set "
                "task.labelled=0 and sft=null."
            )
        columns.append(rows)
    return [row for rows in zip_longest(*columns) for row in rows if row is not None]


def _rows(
    config: ReasoningConfig, name: str, seed: int, share: int, used: set[str]
) -> Iterator[Row]:
    options, size = config.datasets[name], max(1, share * _TRIES)
    # Row i of a generator is drawn from its seed + i, which some give to NumPy: 32 bits.
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
            "entry": freeze(entry),
        }


def _gold(dataset: Any, entry: Mapping[str, Any]) -> str | None:
    """An answer that the scorer takes for right: the entry's, or an example among its metadata."""
    examples = [v for k, v in entry["metadata"].items() if "answer" in k or "solution" in k]
    for answer in (entry["answer"], *examples):
        answer = json.dumps(answer) if isinstance(answer, dict) else answer
        try:
            if isinstance(answer, str) and dataset.score_answer(answer, entry) >= 1.0:
                return answer
        except Exception:  # it was no answer
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
