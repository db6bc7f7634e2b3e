"""The common parts of the stages that learn from rows: their keys, the rows of an update, and the
check that a row is not too long. It must not import a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, Field

from gearshift.data import DataConfig, Mixture, errors_at
from gearshift.data.rows import text_size
from gearshift.errors import OverlongError
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.terminal import counted
from gearshift.trainers.needs import Inputs, MemoryNeeds, Tree
from gearshift.trainers.stage import StageConfig

Row = TypeVar("Row")
_UNCOUNTED_SIZE = 1 << 20
"""A row of at most this many characters is always tokenized before it is refused as too long."""
_LONG_TOKEN = 32
"""The number of characters of a very long token; text has about four characters per token."""


def _unweighted(config: DataConfig) -> DataConfig:
    if any(source.weight != 1.0 for source in config.sources):
        raise ValueError("held-out sources are not mixed; leave out their weight.")
    return config


HeldoutConfig = Annotated[DataConfig, AfterValidator(_unweighted)]
"""The data that a stage only measures by: all rows of its sources."""


class SupervisedStageConfig(StageConfig):
    """A stage that passes over rows."""

    data: DataConfig = DataConfig()
    """The rows to learn from."""
    epochs: float = Field(default=1.0, gt=0)
    """How often the stage passes over its rows."""
    batch_size: int = Field(default=16, ge=1)
    """How many rows one update has; the last update has the remaining rows."""
    max_length: int = Field(default=1024, ge=2)
    """How many tokens a row may have; `data.overlong` decides what happens to longer rows."""
    micro_batch_tokens: int = Field(default=4096, ge=0)
    """How many tokens one micro-batch has, at most. This limits the memory and does not change the
    gradient. With 0 it is as many as fit into the memory when the stage begins."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5, schedule="linear")
    """AdamW and its schedule."""

    sequences_in_row: ClassVar[int] = 1
    row_is: ClassVar[str] = "row"

    def seen(self, rows: int) -> int:
        """The total number of rows that are learned from; a row counts at each use."""
        return max(1, math.ceil(round(self.epochs * rows, 6)))

    def steps(self, rows: int) -> int:
        """The total number of updates."""
        return math.ceil(self.seen(rows) / self.batch_size)

    def batch(self, rows: Mixture[Row], step: int) -> list[Row]:
        """The rows of one update."""
        first = step * self.batch_size
        end = min(first + self.batch_size, self.seen(len(rows)))
        return [rows.example_at(i) for i in range(first, end)]

    def describe(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs:g} epochs"
        return f"{epochs} in batches of {counted(self.batch_size, self.row_is)}"

    def inputs(self) -> Inputs:
        return Inputs(learned=(self.data,))

    def memory_needs(self) -> MemoryNeeds:
        most = self.sequences_in_row * self.batch_size * self.max_length
        tree = Tree(0, 1, self.max_length)
        return MemoryNeeds(self.optimizer, self.micro_batch_tokens, most, tree, dropout=True)


@contextmanager
def row_limits(
    example: Any, number: int, max_length: int, context: int
) -> Iterator[Callable[[int], None]]:
    """Inside, a row becomes tokens, and errors name it: the place that it is from, or its number.
    Gives the function that takes its number of tokens and raises `OverlongError` if they are more
    than the stage's `max_length` or the model's `context`.
    """
    with errors_at(example.where or f"Row {number}"):
        _check_size(example, max_length, context)
        yield partial(_check_length, max_length=max_length, context=context)


def _check_length(tokens: int, max_length: int, context: int) -> None:
    if tokens > min(max_length, context):
        most = f"max_length={max_length}; raise it, drop the row,"
        if context < max_length:
            most = f"the {context} of the model; shorten or drop the row,"
        raise OverlongError(f"it has {tokens} tokens, over {most} or set the data's overlong=drop.")


def _check_size(example: Any, max_length: int, context: int) -> None:
    """Raises `OverlongError` for a row that has so many characters that it cannot fit: to tokenize
    it would take minutes and gigabytes.
    """
    size = text_size([getattr(example, f.name) for f in fields(example) if f.name != "where"])
    if size > max(_UNCOUNTED_SIZE, _LONG_TOKEN * min(max_length, context)):
        raise OverlongError(
            f"it has {size:,} characters, far over what {min(max_length, context)} tokens hold; "
            "shorten or drop the row, or set the data's overlong=drop."
        )
