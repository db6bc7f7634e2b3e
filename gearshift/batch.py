"""The only batch type of training, and functions that make it from token sequences. `types.py`
explains the letters of shapes.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Piece = tuple[Sequence[int], Sequence[int]]
"""Token ids and their mask."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Many sequences end to end, with no padding. The only batch type of training.

    A sequence may continue another one, its *parent*: it then attends to the parent's tokens too,
    and its positions go on from them. So the prompt of a group is stored, computed and
    differentiated once:

        input_ids     p p p | a a | b b b | c c        prompt, then its three completions
        position_ids  0 1 2 | 3 4 | 3 4 5 | 3 4
        cu_seqlens    0 3 5 8 10
        parents       -1 0 0 0
        loss_mask     0 0 0 | 1 1 | 1 1 1 | 1 1

    A token with mask 1 is predicted from the hidden state before it: the token to its left, or, at
    the start of a sequence with a parent, the parent's last token.
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64."""
    cu_seqlens: Tensor
    """[N+1] int64, on the CPU: where each sequence starts, then T."""
    parents: Tensor
    """[N] int64, on the CPU: the index of the sequence that this one continues, or -1."""
    loss_mask: Tensor
    """[T] bool: the scored tokens, M of them."""
    loss_weights: Tensor | None = None
    """[T] float32: the weight of each scored token in the loss. It is computed over the whole
    batch, so that the gradient does not depend on how the batch is split.
    """
    advantages: Tensor | None = None
    """[T] float32."""
    returns: Tensor | None = None
    """[T] float32: the target of the value model."""
    old_values: Tensor | None = None
    """[T] float32: the value model's values before the first update on this batch."""
    old_logprobs: Tensor | None = None
    """[T] float32: under the policy before the first update on this batch."""
    ref_logprobs: Tensor | None = None
    """[T] float32: under the reference policy."""
    sampler_logprobs: Tensor | None = None
    """[T] float32: log-probs from the generation gear when it sampled."""
    places: Tensor | None = None
    """[T] int64: where each token was in the batch that this one is cut from."""

    def __len__(self) -> int:
        """T, the number of tokens to compute."""
        return int(self.input_ids.shape[0])

    @property
    def logit_indices(self) -> Tensor:
        """[M] int64: for each scored token the index of the hidden state that predicts it.

        Raises ValueError where a scored token opens a sequence without a parent: nothing predicts
        it.
        """
        previous = torch.arange(-1, len(self) - 1)
        starts = self.cu_seqlens[:-1]
        parents_end = torch.where(
            self.parents >= 0, self.cu_seqlens[self.parents.clamp(min=0) + 1] - 1, -1
        )
        previous[starts] = parents_end
        rows = previous.to(self.loss_mask.device)[self.loss_mask]
        if bool((rows < 0).any()):
            raise ValueError("A scored token opens a sequence that has no parent.")
        return rows

    @property
    def targets(self) -> Tensor:
        """[M] int64: the scored tokens themselves."""
        return self.input_ids[self.loss_mask]

    @property
    def completion_lengths(self) -> Tensor:
        """[N] int64, on the CPU: scored tokens in each sequence (0 for a shared prompt)."""
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self.loss_mask.cpu().cumsum(0)])
        return ends[self.cu_seqlens[1:]] - ends[self.cu_seqlens[:-1]]

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence, with those of the sequences that it continues."""
        ends: list[int] = []
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()
        for length, parent in zip(lengths, self.parents.tolist(), strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        return max(ends, default=0)

    def scored(self, name: str) -> Tensor:
        """[M]: the per-token field `name` at the scored tokens. Raises ValueError if not set."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"This batch has no {name}.")
        return value[self.loss_mask]

    def with_scored(self, **values_M: Tensor) -> PackedBatch:
        """A copy whose per-token fields hold these [M] values at the scored tokens, 0 elsewhere."""
        spread = {}
        for name, value in values_M.items():
            spread[name] = torch.zeros(len(self), dtype=torch.float32, device=self.input_ids.device)
            spread[name][self.loss_mask] = value.detach().float()
        return replace(self, **spread)

    def with_unscored(self, left_out_M: Tensor) -> PackedBatch:
        """A copy in which these of the scored tokens ([M] bool) are not scored."""
        mask = self.loss_mask.clone()
        mask[self.loss_mask] = ~left_out_M
        return replace(self, loss_mask=mask)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its token tensors on `device`; the layout stays on the CPU."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if f.name not in ("cu_seqlens", "parents") and getattr(self, f.name) is not None
        }
        return replace(self, **moved)

    @staticmethod
    def join(batches: Sequence[PackedBatch]) -> PackedBatch:
        """One batch of these batches end to end; all must have the same fields set."""
        tokens = torch.tensor([0, *(len(b) for b in batches)]).cumsum(0)
        sequences = torch.tensor([0, *(len(b.parents) for b in batches)]).cumsum(0)
        joined = {
            f.name: torch.cat([getattr(b, f.name) for b in batches])
            for f in fields(PackedBatch)
            if f.name not in ("cu_seqlens", "parents") and getattr(batches[0], f.name) is not None
        }
        starts = [b.cu_seqlens[:-1] + t for b, t in zip(batches, tokens, strict=False)]
        parents = [
            torch.where(b.parents >= 0, b.parents + n, -1)
            for b, n in zip(batches, sequences, strict=False)
        ]
        return PackedBatch(
            **joined, cu_seqlens=torch.cat([*starts, tokens[-1:]]), parents=torch.cat(parents)
        )

    def prompt_groups(self) -> list[tuple[int, int]]:
        """Ranges of sequences [first, last) that attend to no sequence outside: a single one, or a
        group.
        """
        roots = [i for i, parent in enumerate(self.parents.tolist()) if parent < 0]
        return list(zip(roots, [*roots[1:], len(self.parents)], strict=True))

    def slice(self, first: int, last: int) -> PackedBatch:
        """Sequences [first, last) as a batch of their own; they must be whole trees."""
        start, end = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        parents = self.parents[first:last]
        return replace(
            self,
            **self._at(slice(start, end)),
            cu_seqlens=self.cu_seqlens[first : last + 1] - start,
            parents=torch.where(parents >= 0, parents - first, parents),
        )

    def _at(self, where: builtins.slice | Tensor) -> dict[str, Tensor]:
        """The fields of these tokens."""
        return {
            f.name: getattr(self, f.name)[where]
            for f in fields(self)
            if f.name not in ("cu_seqlens", "parents") and getattr(self, f.name) is not None
        }

    def select_sequences(self, wanted_T: Tensor) -> PackedBatch:
        """The sequences that hold a wanted token (`wanted_T` [T] bool), and those that they
        continue; the first tree if no token is wanted.
        """
        lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        parents = self.parents.tolist()
        kept = [bool(part.any()) for part in wanted_T.split(lengths.tolist())]
        for i in reversed(range(len(kept))):  # a parent comes before its children
            if kept[i] and parents[i] >= 0:
                kept[parents[i]] = True
        if not any(kept):
            return self.slice(*self.prompt_groups()[0])
        kept_N = torch.tensor(kept)
        kept_T = torch.repeat_interleave(kept_N, lengths).to(wanted_T.device)
        moved_N = kept_N.cumsum(0) - 1
        old = self.parents[kept_N]
        return replace(
            self,
            **self._at(kept_T),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths[kept_N].cumsum(0)]),
            parents=torch.where(old >= 0, moved_N[old.clamp(min=0)], -1),
        )

    def split_groups(self, micro_batch_tokens: int, ranks: int = 1) -> Iterator[PackedBatch]:
        """The micro-batches of `split`, in which groups of more than `micro_batch_tokens` are cut,
        too, and larger groups where there are fewer than `ranks`: into trees that fit, each with
        the prompt. The scored tokens keep their order.
        """
        most = micro_batch_tokens
        if len(self.prompt_groups()) < ranks:
            most = min(most, -(-len(self) // ranks))
        return self._with_cut_groups(most).split(micro_batch_tokens, ranks)

    def _with_cut_groups(self, most: int) -> PackedBatch:
        starts, old = self.cu_seqlens.tolist(), self.parents.tolist()
        sizes = [end - start for start, end in pairwise(starts)]
        trees = self.prompt_groups()
        if all(starts[end] - starts[first] <= most for first, end in trees):
            return self
        scored = self.completion_lengths.tolist()
        order: list[int] = []  # which sequences follow each other, a prompt as often as needed
        parents: list[int] = []
        for first, end in trees:
            moved = len(order) - first
            group = not scored[first] and set(old[first + 1 : end]) == {first}
            if not group or starts[end] - starts[first] <= most:
                order += range(first, end)
                parents += [p + moved if p >= 0 else -1 for p in old[first:end]]
                continue
            root = size = -1
            for i in range(first + 1, end):
                if root < 0 or size + sizes[i] > most:
                    root, size = len(order), sizes[first]
                    order.append(first)
                    parents.append(-1)
                order.append(i)
                parents.append(root)
                size += sizes[i]
        tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
        return replace(
            self,
            **self._at(tokens.to(self.input_ids.device)),
            cu_seqlens=torch.tensor([0, *(sizes[i] for i in order)]).cumsum(0),
            parents=torch.tensor(parents),
        )

    def split(self, micro_batch_tokens: int, ranks: int = 1) -> Iterator[PackedBatch]:
        """Cut into micro-batches of whole trees, in order: as few as `micro_batch_tokens` allows,
        but a multiple of `ranks` where there are so many trees, and of about one size. A tree that
        is longer is a micro-batch alone.
        """
        trees = self.prompt_groups()
        if not trees:
            return
        sizes = [int(self.cu_seqlens[end] - self.cu_seqlens[first]) for first, end in trees]

        def cuts(limit: int) -> list[int]:
            """Where each micro-batch after the first begins."""
            found, tokens = [], 0
            for i, size in enumerate(sizes):
                if tokens + size > limit and tokens:
                    found.append(i)
                    tokens = 0
                tokens += size
            return found

        # The smallest limit that needs no more of them.
        low, high, count = 0, micro_batch_tokens, len(cuts(micro_batch_tokens)) + 1
        most = -(-count // ranks) * ranks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cuts(middle)) < most else (middle, high)
        starts = [0, *cuts(high), len(trees)]
        for first, end in pairwise(starts):
            yield self.slice(trees[first][0], trees[end - 1][1])


def pack(sequences: Sequence[Piece]) -> PackedBatch:
    """A batch of (ids, mask) pairs end to end; each is a sequence of its own. Raises ValueError for
    an empty one, or where ids and mask differ in length.
    """
    return _pack((ids, mask, 0, -1) for ids, mask in sequences)


def pack_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[Piece]]], share: bool = True
) -> PackedBatch:
    """A batch of prompts with their continuations (ids, mask), in the continuations' order.

    share=True stores a prompt once, as the parent of its continuations; an empty prompt leaves its
    continuations as sequences of their own. share=False repeats the prompt, unscored, before each
    continuation.
    """
    if not share:
        return pack(
            [
                ([*prompt, *ids], [0] * len(prompt) + list(mask))
                for prompt, continuations in groups
                for ids, mask in continuations
            ]
        )
    return _pack(_trees(groups))


def _trees(
    groups: Sequence[tuple[Sequence[int], Sequence[Piece]]],
) -> Iterable[tuple[Sequence[int], Sequence[int], int, int]]:
    count = 0
    for prompt, continuations in groups:
        root = count if prompt and continuations else -1
        if root >= 0:
            yield prompt, [0] * len(prompt), 0, -1
            count += 1
        for ids, mask in continuations:
            yield ids, mask, len(prompt), root
            count += 1


def _pack(rows: Iterable[tuple[Sequence[int], Sequence[int], int, int]]) -> PackedBatch:
    """Rows of (ids, mask, first position, parent)."""
    ids: list[int] = []
    positions: list[int] = []
    masks: list[int] = []
    starts, parents = [0], []
    for row_ids, mask, first, parent in rows:
        if not len(row_ids) == len(mask) > 0:
            raise ValueError(f"{len(row_ids)} token ids came with a mask of {len(mask)}.")
        ids += row_ids
        positions += range(first, first + len(row_ids))
        masks += mask
        starts.append(len(ids))
        parents.append(parent)
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(starts),
        parents=torch.tensor(parents, dtype=torch.int64),
        loss_mask=torch.tensor(masks, dtype=torch.bool),
    )


def chunks_by_tokens(
    lengths: Sequence[int], micro_batch_tokens: int, ranks: int = 1
) -> list[slice]:
    """Slices of consecutive sequences whose padded size (longest x count) stays within
    `micro_batch_tokens`; each has one sequence at least. For several ranks there is a multiple of
    their number, or nearly so.
    """

    def chunks(most: int) -> list[slice]:
        """Slices of at most so many sequences."""
        found, first = [], 0
        for i in range(1, len(lengths) + 1):
            longer = max(lengths[first : i + 1]) * (i + 1 - first) > micro_batch_tokens
            if i == len(lengths) or longer or i - first == most:
                found.append(slice(first, i))
                first = i
        return found

    return for_ranks(chunks, len(lengths), ranks)


def for_ranks(cut: Callable[[int], list[T]], count: int, ranks: int) -> list[T]:
    """The pieces that `cut` makes of `count` things, given how many a piece may have: as few as
    possible for one rank, and about a multiple of `ranks` for several.
    """
    found = cut(count)
    return cut(-(-count // (-(-len(found) // ranks) * ranks))) if len(found) % ranks else found
