"""Keys and values of live sequences: a slot a row, a token's place its position. Knows no model and
no request.

No slot outlives the call that filled it, so a change of weights leaves nothing stale to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.models.attention import AttentionOptions, attend


class KVCache:
    """`[rows, K, length, D]` keys and values for each layer, allocated when a layer first writes.

    Nothing is read that the present use did not write: a query looks only below its own position.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.allocated, self.rows, self.length = rows, rows, length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def open(self, rows: int) -> None:
        """Use this many of the allocated rows; whatever they held is forgotten."""
        self.rows = rows

    def write(self, layer: int, where: Span, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, S, D] at rows and positions of `where`; returns all that those rows hold so
        far.
        """
        if layer not in self.keys:
            self.keys[layer] = self._empty(key)
            self.values[layer] = self._empty(value)
        keys, values = self.keys[layer][where.rows], self.values[layer][where.rows]
        if where.positions.shape[1] == 1:
            row = torch.arange(len(key), device=key.device)
            keys[row, :, where.positions[:, 0]] = key[:, :, 0]
            values[row, :, where.positions[:, 0]] = value[:, :, 0]
        else:  # a prefill: every row starts at position 0
            keys[:, :, : key.shape[2]] = key
            values[:, :, : value.shape[2]] = value
        return keys[:, :, : where.extent], values[:, :, : where.extent]

    def copy(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes row `source` up to `length`: a shared prompt, or a moving row."""
        for store in (*self.keys.values(), *self.values.values()):
            store[target, :, :length] = store[source, :, :length]

    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys.values(), *self.values.values()))

    def _empty(self, like: Tensor) -> Tensor:
        shape = (self.allocated, like.shape[1], self.length, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Span:
    """Where one forward writes and looks: rows [start, stop) at `positions` [B, S], keys below
    `extent`.
    """

    rows: slice
    positions: Tensor
    extent: int


class CachedLayout:
    """Attention of one forward of the generation gear: write, then look at positions up to one's
    own.
    """

    def __init__(self, cache: KVCache, where: Span) -> None:
        self.cache, self.where = cache, where
        device = where.positions.device
        self.distance = where.positions[:, :, None] - torch.arange(where.extent, device=device)
        self.mask = self.distance >= 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[B, H, S, D] queries, [B, K, S, D] new keys and values -> [B, H, S, D]."""
        keys, values = self.cache.write(layer, self.where, key, value)
        mask = self.mask
        if options.window is not None:
            mask = mask & (self.distance < options.window)
        return attend(query, keys, values, mask, options)
