"""Mixes several sources with weights into one endless order of examples, which is a pure function
of (seed, position).

So a checkpoint needs only the step to know the position in the data, and a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch

from gearshift.errors import DataError
from gearshift.runtime.seeding import generator

T = TypeVar("T")


class Mixture(Generic[T]):
    """An epoch is a multiset of the sources' rows, shuffled again for each epoch. Each source has
    its own shuffled order, so no row repeats before all rows of its source have come once.
    """

    def __init__(self, sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> None:
        """`weights` are relative: 1 and 3 mean a quarter and three quarters of an epoch.

        Raises `DataError` if a source is empty.
        """
        for i, source in enumerate(sources):
            if not source:
                raise DataError(
                    f"Source {i + 1} has no rows left; look at its file and at what cleaning "
                    "dropped."
                )
        self._sources, self._seed = sources, seed
        rows, total = sum(map(len, sources)), sum(weights)
        self._ends = [round(rows * sum(weights[: i + 1]) / total) for i in range(len(weights))]
        # The order of an epoch and of each source is made when it is needed, and kept for a while.
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    def __len__(self) -> int:
        """How many examples an epoch has: as many as the sources have rows."""
        return self._ends[-1]

    def rows(self) -> list[T]:
        """Every row of every source once."""
        return [row for source in self._sources for row in source]

    def example_at(self, position: int) -> T:
        """The example at this position of the endless order."""
        epoch, place = divmod(position, len(self))
        entry = self._permutation(f"mixture/{epoch}", len(self))[place]
        source = bisect_right(self._ends, entry)
        rows, first = self._sources[source], self._ends[source - 1] if source else 0
        nth = epoch * (self._ends[source] - first) + entry - first
        walk, index = divmod(nth, len(rows))
        return rows[self._permutation(f"source/{source}/{walk}", len(rows))[index]]

    def batch(self, step: int, batch_size: int) -> list[T]:
        """The examples [step * batch_size, (step + 1) * batch_size)."""
        return [self.example_at(step * batch_size + i) for i in range(batch_size)]

    def _make_permutation(self, name: str, size: int) -> list[int]:
        return torch.randperm(size, generator=generator(self._seed, name)).tolist()
