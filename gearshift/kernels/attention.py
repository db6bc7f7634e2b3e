"""Attention as tensor functions: of rows of one length, and of packed sequences.

S is the queries of a row here, and L its keys.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.batch import PackedBatch
from gearshift.kernels.autograd import Inherit, Pick
from gearshift.kernels.specs import AttentionOptions

_PLAIN_SCORES = 2**25
"""With more scores than this, a CPU is faster with PyTorch's kernel, which never stores them."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, o: AttentionOptions) -> Tensor:
    """Grouped-query attention that does not repeat keys.

    Args: query [B, Q, S, D]; key and value [B, K, L, D]; mask [B, S, L] bool, True where it may
    look.
    Returns [B, Q, S, D].
    """
    B, Q, S, D = query.shape
    K, L = key.shape[1], key.shape[2]
    plain = o.softcap is not None or (not query.is_cuda and B * Q * S * L <= _PLAIN_SCORES)
    if not plain:
        return F.scaled_dot_product_attention(
            query, key, value, mask[:, None], o.dropout, scale=o.scaling, enable_gqa=Q != K
        )
    grouped = (query * o.scaling).reshape(B, K, Q // K * S, D)
    scores = (grouped @ key.transpose(2, 3)).view(B, K, Q // K, S, L)
    if o.softcap is not None:
        scores = torch.tanh(scores / o.softcap) * o.softcap
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    if o.dropout:
        weights = F.dropout(weights, o.dropout)
    return (weights.view(B, K, -1, L) @ value).view(B, Q, S, D)


class PackedSequences:
    """Attention of a `PackedBatch`: a token sees those of its own sequence and of its sequence's
    ancestors whose position is not after its own.

    Only attention sees padded rows: sequences of about one length are computed together, and each
    row's keys are those of its ancestors, then its own. Everything else in a model runs on T
    tokens.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self.cu, self.parents = batch.cu_seqlens.contiguous(), batch.parents.contiguous()
        firsts = [first for first, _ in batch.prompt_groups()]
        self.trees = torch.tensor([*firsts, len(batch.parents)])

    @cached_property
    def rows(self) -> list[_Rows]:
        """Sequences of about one length and of one number of ancestors."""
        lengths = (self.cu[1:] - self.cu[:-1]).tolist()
        depth_of: list[int] = []
        for parent in self.parents.tolist():
            depth_of.append(0 if parent < 0 else depth_of[parent] + 1)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (length, depth) in enumerate(zip(lengths, depth_of, strict=True)):
            alike.setdefault((length.bit_length(), depth), []).append(i)
        return [_Rows(self.batch, members, depth) for (_, depth), members in alike.items()]

    @cached_property
    def back_T(self) -> Tensor:
        """[T]: where each token lies in the rows' outputs, end to end."""
        order_T = torch.cat([rows.tokens for rows in self.rows])
        back_T = torch.empty_like(order_T)
        back_T[order_T] = torch.arange(len(order_T), device=order_T.device)
        return back_T

    @cached_property
    def consecutive(self) -> bool:
        """Whether positions go up by one along each line of ancestors, so that what a query sees
        is a run of keys.
        """
        positions = self.batch.position_ids.cpu()
        steps = positions[1:] - positions[:-1]
        starts = self.cu[1:-1] - 1
        steps[starts] = 1
        child = self.parents >= 0
        ends = positions[self.cu[self.parents[child] + 1] - 1]
        return bool((steps == 1).all() and (positions[self.cu[:-1][child]] == ends + 1).all())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] queries, keys and values -> [T, Q, D]."""
        out = torch.cat([rows.attend(q, k, v, options) for rows in self.rows])
        picked: Tensor = Pick.apply(out, self.back_T, None)
        return picked


class _Rows:
    """Sequences that are computed together: N rows of at most S tokens, L keys each."""

    def __init__(self, batch: PackedBatch, members: list[int], depth: int) -> None:
        device, members_N = batch.input_ids.device, torch.tensor(members)
        lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]

        def places(sequences: Tensor) -> tuple[Tensor, Tensor]:
            """[n, longest] tokens of each sequence, filled up with its last, and which are real."""
            inside = torch.arange(int(lengths[sequences].max()))[None]
            length = lengths[sequences, None]
            return batch.cu_seqlens[sequences, None] + inside.minimum(length - 1), inside < length

        def flat(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
            """What `Pick` takes, and the shape that it fills."""
            kept = torch.nonzero(real.flatten()).squeeze(1)
            return tokens.flatten().to(device), kept.to(device), tokens.shape

        positions = batch.position_ids.cpu()
        own, real = places(members_N)
        self.own, self.slots, self.shape = flat(own, real)
        self.tokens = self.own[self.slots]
        self.positions_NS = positions[own].to(device)
        key_positions, key_real = [positions[own]], [real]
        self.ancestors: list[tuple[Tensor, Tensor, torch.Size, Tensor]] = []
        for _ in range(depth):
            members_N = batch.parents[members_N]
            distinct, which_N = torch.unique(members_N, return_inverse=True)
            tokens, there = places(distinct)
            self.ancestors.insert(0, (*flat(tokens, there), which_N.to(device)))
            key_positions.insert(0, positions[tokens][which_N])
            key_real.insert(0, there[which_N])
        self.positions_NL = torch.cat(key_positions, 1).to(device)
        seen = torch.cat(key_real, 1).to(device)[:, None]
        seen = seen & (self.positions_NL[:, None] <= self.positions_NS[:, :, None])
        # A filled-up query must see something, or softmax makes NaN.
        self.mask = seen | ~real.to(device)[:, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] each -> [tokens of these rows, Q, D]."""
        mask = self.mask
        if options.window is not None:
            distance = self.positions_NS[:, :, None] - self.positions_NL[:, None]
            mask = mask & (distance < options.window)
        query = Pick.apply(q, self.own, self.slots).unflatten(0, self.shape)
        out = attend(query.transpose(1, 2), self._keys(k), self._keys(v), mask, options)
        return Pick.apply(out.transpose(1, 2).flatten(0, 1), self.slots, None)

    def _keys(self, x: Tensor) -> Tensor:
        """[T, K, D] -> [N, K, L, D]: of each row's ancestors, then its own."""
        parts = [
            Inherit.apply(Pick.apply(x, tokens, kept).unflatten(0, shape), which)
            for tokens, kept, shape, which in self.ancestors
        ]
        parts.append(Pick.apply(x, self.own, self.slots).unflatten(0, self.shape))
        return (torch.cat(parts, 1) if self.ancestors else parts[0]).transpose(1, 2)
