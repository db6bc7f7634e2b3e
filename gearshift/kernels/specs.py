"""The records that kernels take: norms, attention, heads, and where the tokens of a forward lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from gearshift.kernels.rows import MOST_KEYS, Part, Rows, alike, filled_up, place

BLOCK = 16
"""P: positions in a block, as many as the widest registers of a CPU have lanes."""

VOCABULARY_BLOCK = 256
"""Tokens of the vocabulary whose weights are added up at once, before they are added to the sum.
Sampling first finds such a block, then the token inside it."""

TILE = 8
"""Sequences in a tile: a GPU reads the blocks that they have in common once for all of them."""

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [T, in], weight [out, in], bias -> x weight^T + bias [T, out]."""

Rotary = tuple[Tensor, Tensor]
"""(cos, sin) of each token, [T, rotary size] each."""

Prepare = Callable[[], None]
Run = Callable[[], Tensor]
"""A step is `prepare(); run()`; see `Kernels.capture`."""

Gate = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension."""

    module: nn.Module
    eps: float
    center: bool = False
    """True for LayerNorm, which takes away the mean and may have a bias; False for RMSNorm."""
    offset: bool = False
    """The weight is stored minus one, and is multiplied before rounding (Gemma)."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How an architecture's attention differs from plain attention."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    """A query sees only the last `window` positions; None means all."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""


@dataclass(frozen=True)
class Head:
    """A language-model head on hidden states: logits = softcap(scale * (h W^T + b))."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """[M, V] float32, computed in the head's own precision."""
        return self.shaped(self.linear(hidden_MH)).float()

    def shaped(self, logits_MV: Tensor) -> Tensor:
        """Scale and soft cap on what the linear layer gave: float32, or untouched without them."""
        if self.scale == 1.0 and self.softcap is None:
            return logits_MV
        logits_MV = logits_MV.float()
        if self.scale != 1.0:
            logits_MV = logits_MV * self.scale
        if self.softcap is not None:
            logits_MV = torch.tanh(logits_MV / self.softcap) * self.softcap
        return logits_MV


class AttentionMetadata:
    """Where the tokens of one forward lie: token t is at `positions[t]` of sequence `seq_ids[t]`,
    whose blocks are `block_tables[seq_ids[t]]`.

    The tokens of a sequence come together and in order. The sequences come in the tables' order.
    """

    def __init__(
        self,
        seq_ids: Tensor,
        positions: Tensor,
        block_tables: Tensor,
        logits_indices: Tensor | None = None,
    ) -> None:
        """`logits_indices` [B] are the tokens whose last states are returned; None returns all."""
        self.seq_ids, self.positions = seq_ids, positions
        self.block_tables, self.logits_indices = block_tables, logits_indices
        self.slot_mapping = self._slot_mapping()
        """[T]: block * P + place in the block, where each token's key is written."""

    def refresh(self) -> None:
        """Compute again what follows from the positions and the block tables, after they were
        written in place. `slot_mapping` keeps its memory.
        """
        self.slot_mapping.copy_(self._slot_mapping())
        for name in ("padded", "flat", "blocks", "rows", "common"):
            self.__dict__.pop(name, None)

    def _slot_mapping(self) -> Tensor:
        last = self.block_tables.shape[1] - 1
        block = self.block_tables[self.seq_ids, (self.positions // BLOCK).clamp(max=last)]
        return block * BLOCK + self.positions % BLOCK

    @cached_property
    def padded(self) -> Tensor:
        """[B, S]: each sequence's tokens, filled up with its last."""
        counts = torch.bincount(self.seq_ids, minlength=len(self.block_tables))
        ends = counts.cumsum(0)
        inside = torch.arange(int(counts.max()), device=counts.device)
        return torch.minimum((ends - counts)[:, None] + inside, ends[:, None] - 1)

    @cached_property
    def flat(self) -> Tensor:
        """[T]: where each token lies in `padded`, row after row."""
        starts = torch.searchsorted(self.seq_ids, self.seq_ids)
        inside = torch.arange(len(self.seq_ids), device=self.seq_ids.device) - starts
        return self.seq_ids * self.padded.shape[1] + inside

    @cached_property
    def common(self) -> Tensor:
        """[B / TILE], where each sequence has one token: how many blocks the sequences of a tile
        begin with in common and look at whole.
        """
        B, W = self.block_tables.shape
        # The last tile is filled up with its first row, which changes nothing.
        row = torch.arange(-(-B // TILE) * TILE, device=self.block_tables.device)
        row = torch.where(row < B, row, row // TILE * TILE).view(-1, TILE)
        same = (self.block_tables[row] == self.block_tables[row[:, :1]]).all(1)  # [tiles, W]
        whole = (self.positions + 1)[row].amin(1, keepdim=True) // BLOCK
        same &= torch.arange(W, device=self.block_tables.device) < whole
        return same.long().cumprod(1).sum(1)

    @cached_property
    def blocks(self) -> Tensor:
        """[B, W]: the blocks that some token of this forward may look at."""
        return self.block_tables[:, : int(self.positions.max()) // BLOCK + 1]

    def seen(self, window: int | None) -> Tensor:
        """[B, S, L] bool: which of the blocks' positions each token of `padded` looks at."""
        L = self.blocks.shape[1] * BLOCK
        keys = torch.arange(L, device=self.positions.device)
        own = self.positions[self.padded][:, :, None]
        seen = keys <= own
        return seen if window is None else seen & (keys > own - window)

    @cached_property
    def rows(self) -> list[Rows]:
        """Sequences with about as many new tokens and as many positions, as rows. The one part of
        their keys is the positions of the blocks, and `which` is the sequence. It waits for the
        device once.
        """
        seq_ids, positions = torch.stack((self.seq_ids, self.positions)).cpu()
        counts = torch.bincount(seq_ids, minlength=len(self.block_tables))
        ends = counts.cumsum(0)
        lengths = (positions[ends - 1] // BLOCK + 1) * BLOCK
        sizes = zip(counts.tolist(), lengths.tolist(), strict=True)
        kinds = [(new.bit_length(), length.bit_length()) for new, length in sizes]
        many = []
        for members in alike(kinds, lengths.tolist(), MOST_KEYS):
            some, none = torch.tensor(members), torch.empty((0, 0), dtype=torch.int64)
            tokens, targets = filled_up((ends - counts)[some], counts[some], len(seq_ids))
            keys = torch.arange(int(lengths[some].max()))[None]
            part = Part(keys, some, none, none)
            many.append(Rows(tokens, targets, positions[tokens], [part]))
        place(many, counts[:0], self.positions.device)
        return many
