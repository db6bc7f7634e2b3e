"""Several sources with weights as one endless order of examples: a pure function of (seed,
position).

So the data position in a checkpoint is the step, and a resumed run sees what the uninterrupted one
would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch

from gearshift.errors import DataError
from gearshift.runtime.seeding import generator

T = TypeVar("T")


class Mixture(Generic[T]):
    """An epoch is a multiset of the sources' rows, shuffled anew each time; each source is walked
    in its own shuffled order, so that no row comes twice before all of its source came once.
    """

    def __init__(self, sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> None:
        """`weights` are relative to each other: 1 and 3 mean a quarter and three quarters of an
        epoch.

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
        ends = [round(rows * sum(weights[: i + 1]) / total) for i in range(len(weights))]
        self._counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self._order = lru_cache(maxsize=4)(self._shuffle)

    def __len__(self) -> int:
        """Examples in an epoch: as many as the sources have rows."""
        return sum(self._counts)

    def example_at(self, position: int) -> T:
        """The example at this place of the endless order."""
        epoch, place = divmod(position, len(self))
        source, nth = self._order(epoch)[place]
        walk, index = divmod(epoch * self._counts[source] + nth, len(self._sources[source]))
        return self._sources[source][self._permutation(source, walk)[index]]

    def batch(self, step: int, batch_size: int) -> list[T]:
        """Examples [step * batch_size, (step + 1) * batch_size)."""
        return [self.example_at(step * batch_size + i) for i in range(batch_size)]

    def _shuffle(self, epoch: int) -> list[tuple[int, int]]:
        entries = [(s, n) for s, count in enumerate(self._counts) for n in range(count)]
        order = torch.randperm(len(entries), generator=generator(self._seed, f"mixture/{epoch}"))
        return [entries[i] for i in order.tolist()]

    @lru_cache(maxsize=64)  # noqa: B019 - a mixture lives as long as its stage
    def _permutation(self, source: int, walk: int) -> list[int]:
        named = generator(self._seed, f"source/{source}/{walk}")
        return torch.randperm(len(self._sources[source]), generator=named).tolist()
