"""Attention as tensor functions: of rows of one length, of rows in chunks that bound its memory,
and of packed sequences.

S is the queries of a row here, and L its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gearshift.batch import PackedBatch
from gearshift.kernels.autograd import Inherit, Pick
from gearshift.kernels.rows import (
    MOST_KEYS,
    NOWHERE,
    Chunk,
    Part,
    Rows,
    alike,
    filled_up,
    place,
)
from gearshift.kernels.specs import AttentionOptions

_PLAIN_SCORES = 2**25
"""With more scores than this, a CPU is faster with PyTorch's kernel, which never stores them."""
_WITHOUT_PLANS = [
    SDPBackend.EFFICIENT_ATTENTION,  # GPU
    SDPBackend.FLASH_ATTENTION,  # CPU; a GPU's takes no masks
    SDPBackend.MATH,  # never ours: it is for other threads, since the choice is the process's
]
"""cuDNN is left out: it makes a plan for each new shape, which takes longer than the attention."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, o: AttentionOptions) -> Tensor:
    """Grouped-query attention that does not repeat keys, for a CPU.

    Args: query [B, Q, S, D]; key and value [B, K, L, D]; mask [B, S, L] bool, True where it may
    look.
    Returns [B, Q, S, D].
    """
    B, Q, S, _ = query.shape
    K, L = key.shape[1], key.shape[2]
    if o.softcap is not None or B * Q * S * L <= _PLAIN_SCORES:
        return attend_storing(query, key, value, mask, o)
    return F.scaled_dot_product_attention(
        query, key, value, mask[:, None], o.dropout, scale=o.scaling, enable_gqa=Q != K
    )


def attend_storing(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, o: AttentionOptions
) -> Tensor:
    """`attend`, which stores all scores [B, Q, S, L]."""
    B, Q, S, D = query.shape
    K, L = key.shape[1], key.shape[2]
    grouped = (query * o.scaling).reshape(B, K, Q // K * S, D)
    scores = (grouped @ key.transpose(2, 3)).view(B, K, Q // K, S, L)
    if o.softcap is not None:
        scores = torch.tanh(scores / o.softcap) * o.softcap
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    if o.dropout:
        weights = F.dropout(weights, o.dropout)
    return (weights.view(B, K, -1, L) @ value).view(B, Q, S, D)


def stores_scores(query: Tensor, o: AttentionOptions) -> bool:
    """Whether attention of a chunk has to store its scores, because PyTorch has no kernel with a
    mask that does not.
    """
    device = query.device
    if o.softcap is not None or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cpu":
        return o.dropout > 0
    return not _has_efficient(device, query.dtype, query.shape[-1])


@lru_cache
def _has_efficient(device: torch.device, dtype: torch.dtype, D: int) -> bool:
    """Whether PyTorch's memory-efficient kernel runs on this GPU for this type and head size."""
    query, bias = (torch.empty((1, 1, 16, x), dtype=dtype, device=device) for x in (D, 16))
    return can_use_efficient_attention(SDPAParams(query, query, query, bias, 0.0, False, False))


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, chunk: Chunk, o: AttentionOptions
) -> Tensor:
    """Attention of a chunk of rows: query [N, C, Q, D]; key and value [N, L, K, D] ->
    [N, C, Q, D].
    """
    Q, K = query.shape[2], key.shape[2]
    query = query.transpose(1, 2)
    if stores_scores(query, o):
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        mask = rows.mask(chunk, o.window)
        return attend_storing(query, key, value, mask, o).transpose(1, 2)
    key, value = (
        x[:, :, :, None].expand(-1, -1, -1, Q // K, -1).flatten(2, 3).transpose(1, 2)
        for x in (key, value)
    )
    bias = rows.bias(chunk, o.window, query.dtype)
    with sdpa_kernel(_WITHOUT_PLANS):
        out = F.scaled_dot_product_attention(query, key, value, bias, o.dropout, scale=o.scaling)
    return out.transpose(1, 2)


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
        self._placed: dict[int | None, tuple[list[Rows], Tensor]] = {}

    @cached_property
    def positions(self) -> Tensor:
        """[T] positions, on the CPU. On a GPU this is the only time that attention waits for it."""
        return self.batch.position_ids.cpu()

    @cached_property
    def consecutive(self) -> bool:
        """Whether positions go up by one along each line of ancestors, so that what a query sees
        is a run of keys.
        """
        positions = self.positions
        steps = positions[1:] - positions[:-1]
        starts = self.cu[1:-1] - 1
        steps[starts] = 1
        child = self.parents >= 0
        ends = positions[self.cu[self.parents[child] + 1] - 1]
        return bool((steps == 1).all() and (positions[self.cu[:-1][child]] == ends + 1).all())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] queries, keys and values -> [T, Q, D]."""
        many, back_T = self._rows(q.device, None)
        parts = []
        for rows in many:
            query, key, value = (x.transpose(1, 2) for x in _picked(q, k, v, rows, rows.whole))
            out = attend(query, key, value, rows.mask(rows.whole, options.window), options)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        picked: Tensor = Pick.apply(torch.cat(parts), back_T, None)
        return picked

    def attend_chunked(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """`attend` in chunks of bounded memory. Only q, k and v are kept: the backward pass
        computes each chunk again.
        """
        heads = q.shape[1] if stores_scores(q, options) else 1
        many, back_T = self._rows(q.device, heads)

        def one(q: Tensor, k: Tensor, v: Tensor, rows: Rows, chunk: Chunk) -> Tensor:
            return attend_chunk(*_picked(q, k, v, rows, chunk), rows, chunk, options).flatten(0, 1)

        run: Callable[..., Tensor] = one
        if torch.is_grad_enabled():
            random = options.dropout > 0
            run = partial(checkpoint, one, use_reentrant=False, preserve_rng_state=random)
        parts = [
            run(q, k, v, rows, chunk)
            for rows in many
            for chunk in rows.chunks(options.window, heads)
        ]
        picked: Tensor = Pick.apply(torch.cat(parts), back_T, None)
        return picked

    def _rows(self, device: torch.device, heads: int | None) -> tuple[list[Rows], Tensor]:
        """Sequences of about one length and of one number of ancestors, and [T] where each token
        lies in their chunks' queries, end to end. `heads` of them store scores; None makes one
        chunk of each.
        """
        if heads not in self._placed:
            lengths = (self.cu[1:] - self.cu[:-1]).tolist()
            depth_of: list[int] = []
            ends: list[int] = []
            for length, parent in zip(lengths, self.parents.tolist(), strict=True):
                depth_of.append(0 if parent < 0 else depth_of[parent] + 1)
                ends.append(length + (0 if parent < 0 else ends[parent]))
            kinds = [(n.bit_length(), depth) for n, depth in zip(lengths, depth_of, strict=True)]
            groups = alike(kinds, ends, None if heads is None else MOST_KEYS)
            many = [self._group(members, depth_of[members[0]]) for members in groups]
            order = [
                rows.targets[:, chunk.queries].flatten()
                for rows in many
                for chunk in ([rows.whole] if heads is None else rows.chunks(None, heads))
            ]
            places = torch.arange(sum(map(len, order)))
            back = torch.empty(len(self.batch) + 1, dtype=torch.int64)
            back[torch.cat(order)] = places
            self._placed[heads] = many, place(many, back[:-1], device)
        return self._placed[heads]

    def _group(self, members: list[int], depth: int) -> Rows:
        """These sequences as rows, with their ancestors' keys before their own."""
        lengths, T = self.cu[1:] - self.cu[:-1], len(self.batch)
        members_N = torch.tensor(members)
        tokens, targets = filled_up(self.cu[members_N], lengths[members_N], T)
        positions = self.positions[tokens]
        parts = [
            Part(
                torch.where(targets < T, positions, NOWHERE),
                torch.arange(len(members)), tokens, targets, own=True,
            )
        ]  # fmt: skip
        for _ in range(depth):
            members_N = self.parents[members_N]
            distinct, which = torch.unique(members_N, return_inverse=True)
            keys, ends = filled_up(self.cu[distinct], lengths[distinct], T)
            at = torch.where(ends < T, self.positions[keys], NOWHERE)[which]
            parts.insert(0, Part(at, which, keys, ends))
        return Rows(tokens, targets, positions, parts)


def _picked(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, chunk: Chunk
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, D] each -> queries [N, C, Q, D], keys and values [N, L, K, D] of a chunk."""
    mine = chunk.queries
    query = Pick.apply(q, rows.tokens[:, mine], rows.targets[:, mine])
    return query, _keys(k, rows, chunk), _keys(v, rows, chunk)


def _keys(x: Tensor, rows: Rows, chunk: Chunk) -> Tensor:
    """[T, K, D] -> [N, L, K, D]: of each row's ancestors, then its own."""
    found = []
    for part, some in zip(rows.parts, chunk.keys, strict=True):
        if some.stop is None or some.stop > some.start:
            own = Pick.apply(x, part.tokens[:, some], part.targets[:, some])
            found.append(own if part.own else Inherit.apply(own, part.which))
    return torch.cat(found, 1) if len(found) > 1 else found[0]
