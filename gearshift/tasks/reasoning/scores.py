"""The generators of reasoning-gym and their scorers. Some scorers run an answer as Python: this
file decides which answers may reach them.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from gearshift.errors import ConfigError, DataError
from gearshift.rewards.completion_text import without_thoughts
from gearshift.runtime import tagged_json
from gearshift.types import Message

Format = Literal["whole", "tagged"]

# Scorers that run an answer as Python: as a list, or through sympy as a formula.
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


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "The task reasoning needs reasoning-gym; pip install 'gearshift[reasoning]'."
        ) from None
    return reasoning_gym


def dataset_names() -> list[str]:
    """The names of all generators. Raises `DataError` if reasoning-gym is not installed."""
    _library()
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})  # which is what a list of generators is here


def make_dataset(name: str, options: Mapping[str, Any], seed: int = 0, size: int = 1) -> Any:
    """The generator with these options. Raises `ConfigError` if it does not have them."""
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
    """The generator's score of an answer, at most 1; 0 for one that its scorer cannot read, None
    where the scorer fails on the right answer too.

    A scorer that runs answers as Python gets only plain lists and formulas.
    """
    name, entry = row["dataset"], tagged_json.decode(row["entry"])
    scorer = _scorer(name, json.dumps(row["options"]))
    if not _harmless(name, answer):
        return 0.0
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:  # a scorer may raise any error on a text that it does not expect
        try:
            scorer.score_answer(entry["answer"], entry)
        except Exception:
            return None
        return 0.0


def _harmless(name: str, answer: str) -> bool:
    """Whether it is safe to pass this answer to the generator's scorer."""
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
    """Whether it is a number, a short name, a known function or an operation, without a large
    power.
    """
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
    """Whether it is a whole number or a ratio of two, with an optional sign, and none is above
    `most`.
    """
    if isinstance(exponent, ast.UnaryOp):
        return _small(exponent.operand, most)
    if isinstance(exponent, ast.BinOp):
        parts = (exponent.left, exponent.right)
        return isinstance(exponent.op, ast.Div) and all(_small(part, most) for part in parts)
    return isinstance(exponent, ast.Constant) and exponent.value in range(most + 1)


def read_answer(completion: str, form: Format) -> str:
    """The answer in a completion; empty if the tags are missing, or only in the reasoning part."""
    if form == "whole":
        return completion.strip()
    text = without_thoughts(completion)
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, flags=re.DOTALL)
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
