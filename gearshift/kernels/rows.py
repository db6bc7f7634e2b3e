"""Rows of queries that attention computes together, the keys that they see, and the chunks in which
a GPU computes them. It makes index tensors and masks, and multiplies nothing.

S is the queries of a row here, C the queries of a chunk, and L its keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_KEYS = 2**16 - 1
"""A GPU computes rows together that have at most this many keys (one row may have more), because
the keys are repeated for each query head. It is also the most rows that its kernel takes.
"""
CHUNK_SCORES = 2**26
"""A GPU keeps at most this many scores or mask entries of one chunk."""
KEPT_MASKS = 2**27
"""A batch keeps its masks, of one window each, if they have at most this many entries. Longer rows
make them again in each layer."""
ALIGNED = 16
"""PyTorch's memory-efficient kernel wants the rows of a mask to begin at multiples of this."""
NOWHERE = 2**62
"""The position of a key that does not exist: it lies after all queries."""


@dataclass
class Part:
    """Some of the keys of each row: those of one generation of ancestors, or its own."""

    positions: Tensor
    """[N, l], or [1, l] for all rows; `NOWHERE` fills up."""
    which: Tensor
    """[N]: each row's place among those who have these keys."""
    tokens: Tensor
    """[n, l]: the token of each key; any token fills up."""
    targets: Tensor
    """[n, l]: the same, and T fills up."""
    own: bool = False
    """True where `which` is 0, 1, 2 ..."""


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Some queries of each row, and of each part the keys that one of them may see."""

    queries: slice
    keys: tuple[slice, ...]


class Rows:
    """N rows of at most S queries."""

    def __init__(
        self, tokens: Tensor, targets: Tensor, positions: Tensor, parts: list[Part]
    ) -> None:
        """[N, S] each, on the CPU: the token of each query, where any token fills up; the same,
        where T fills up; its position, where the position of a token of the row fills up.
        """
        self.tokens, self.targets, self.positions, self.parts = tokens, targets, positions, parts
        self.keeps_masks = True
        self.whole = Chunk(slice(None), tuple(slice(None) for _ in parts))
        """All queries and all keys."""
        self._positions, self._key_positions = positions, [part.positions for part in parts]
        self._chunks: dict[tuple[int | None, int], list[Chunk]] = {}
        self._masks: dict[tuple[Chunk, int | None, torch.dtype], Tensor] = {}

    @property
    def scores(self) -> int:
        """N * S * L."""
        return self._positions.numel() * sum(x.shape[1] for x in self._key_positions)

    def chunks(self, window: int | None, heads: int) -> list[Chunk]:
        """All queries, in chunks of at most `CHUNK_SCORES` scores, if `heads` heads store them."""
        if (window, heads) not in self._chunks:
            S = self._positions.shape[1]
            size = max(1, CHUNK_SCORES * S // (self.scores * heads))
            ranges = [slice(a, min(a + size, S)) for a in range(0, S, size)]
            self._chunks[window, heads] = [
                Chunk(queries, self._keys_seen(queries, window)) for queries in ranges
            ]
        return self._chunks[window, heads]

    def mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """[N, C, L] bool: True where a query of the chunk sees a key."""
        return self._kept(chunk, window, torch.bool)

    def bias(self, chunk: Chunk, window: int | None, dtype: torch.dtype) -> Tensor:
        """[N, 1, C, L]: 0 where a query of the chunk sees a key, else -inf. Its strides are
        multiples of `ALIGNED`.
        """
        return self._kept(chunk, window, dtype)[:, None]

    def _kept(self, chunk: Chunk, window: int | None, dtype: torch.dtype) -> Tensor:
        mask = self._masks.get((chunk, window, dtype))
        if mask is None:
            mask = self._seen(chunk, window)
            if dtype != torch.bool:
                N, C, L = mask.shape
                width = -(-L // ALIGNED) * ALIGNED
                bias = torch.full((N, C, width), -torch.inf, dtype=dtype, device=mask.device)
                mask = bias[..., :L].masked_fill_(mask, 0.0)
            if self.keeps_masks:
                self._masks[chunk, window, dtype] = mask
        return mask

    def _seen(self, chunk: Chunk, window: int | None) -> Tensor:
        ranges = zip(self.parts, chunk.keys, strict=True)
        keys = torch.cat([part.positions[:, some] for part, some in ranges], 1)[:, None]
        queries = self.positions[:, chunk.queries, None]
        seen = keys <= queries
        return seen if window is None else seen & (keys > queries - window)

    def _keys_seen(self, queries: slice, window: int | None) -> tuple[slice, ...]:
        """In each part the range of keys that these queries may see, with ends at whole blocks."""
        last = self._positions[:, queries].amax(1, keepdim=True)
        first = self._positions[:, queries].amin(1, keepdim=True)
        ranges = []
        for positions in self._key_positions:
            seen = positions <= last
            if window is not None:
                seen &= positions > first - window
            columns = seen.any(0).nonzero()
            begin, end = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
            begin, end = begin // ALIGNED * ALIGNED, -(-end // ALIGNED) * ALIGNED
            ranges.append(slice(begin, min(end, positions.shape[1])))
        return tuple(ranges)


def alike(kinds: Sequence[Hashable], keys: Sequence[int], most: int | None) -> list[list[int]]:
    """Groups of sequences of one kind; with `most`, such that a group's keys are not more, when
    each sequence has as many as the longest.
    """
    members: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        members.setdefault(kind, []).append(i)
    groups = []
    for group in members.values():
        size = len(group) if most is None else max(1, most // max(keys[i] for i in group))
        groups += [group[first : first + size] for first in range(0, len(group), size)]
    return groups


def filled_up(starts_N: Tensor, lengths_N: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """[N, longest] twice: the tokens of sequences, filled up with the last one, and with T."""
    inside = torch.arange(int(lengths_N.max()))[None]
    tokens = starts_N[:, None] + inside.minimum(lengths_N[:, None] - 1)
    return tokens, torch.where(inside < lengths_N[:, None], tokens, T)


def place(many: Sequence[Rows], extra: Tensor, device: torch.device) -> Tensor:
    """Moves the index tensors of rows, and `extra`, by one copy. Returns `extra`; a batch whose
    masks are large does not keep them.
    """
    keeps = sum(rows.scores for rows in many) <= KEPT_MASKS
    holders: list[tuple[Rows | Part, str]] = []
    for rows in many:
        rows.keeps_masks = keeps
        holders += [(rows, name) for name in ("tokens", "targets", "positions")]
        for part in rows.parts:
            holders += [(part, name) for name in ("positions", "which", "tokens", "targets")]
    if device.type == "cpu":
        return extra
    tensors = [extra, *(getattr(holder, name) for holder, name in holders)]
    flat = torch.cat([x.flatten() for x in tensors]).to(device)
    moved = [
        part.view(x.shape)
        for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
    ]
    for (holder, name), tensor in zip(holders, moved[1:], strict=True):
        setattr(holder, name, tensor)
    return moved[0]
