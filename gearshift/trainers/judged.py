"""Judged rows of preference learning, as token ids and as batches. It must not import a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from gearshift.batch import PackedBatch, pack_groups
from gearshift.data import PreferenceExample, UnpairedExample, render_completion
from gearshift.trainers.supervised import row_limits


@dataclass
class Judged:
    """A prompt and one or two completions; the better one first."""

    prompt: list[int]
    completions: list[list[int]]
    good: list[bool]
    reference: list[float] | None = None
    """Log-prob of each completion under the reference, once it is known."""
    other: list[int] = field(default_factory=list)
    """Another row's completion, with which KTO estimates the KL."""
    other_reference: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def render_judged(
    examples: Sequence[PreferenceExample | UnpairedExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    context: int = 2**20,
) -> list[Judged]:
    """Token ids of each row; raises `DataError` for one that is too long."""
    rows = []
    for number, example in enumerate(examples, start=1):
        if isinstance(example, PreferenceExample):
            answers, good = [example.chosen, example.rejected], [True, False]
        else:
            answers, good = [example.completion], [example.good]
        with row_limits(example, number, max_length, context) as check_length:
            sides = [
                render_completion(tokenizer, example.prompt, answer, example.options)
                for answer in answers
            ]
            prompt = sides[0][0]
            check_length(len(prompt) + max(len(ids) for _, ids in sides))
        rows.append(Judged(prompt, [ids for _, ids in sides], good))
    for row, after in zip(rows, [*rows[1:], *rows[:1]], strict=True):
        row.other = after.completions[0][: min(max_length, context) - len(row.prompt)]
    return rows


def judged_batch(rows: Sequence[Judged], other: bool = False) -> PackedBatch:
    """The rows' completions (or, for KTO's estimate, others'), each row's prompt stored once."""
    return pack_groups([
        (row.prompt, [(ids, [1] * len(ids)) for ids in ([row.other] if other else row.completions)])
        for row in rows
    ])  # fmt: skip
