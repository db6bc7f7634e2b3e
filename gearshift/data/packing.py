"""Token sequences to the one batch type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from gearshift.types import PackedBatch

Piece = tuple[Sequence[int], Sequence[int]]
"""Token ids and their mask."""


def pack(sequences: Sequence[Piece]) -> PackedBatch:
    """(ids, mask) pairs end to end, each a sequence of its own. Raises ValueError for an empty one,
    or where ids and mask differ in length.
    """
    return _pack((ids, mask, 0, -1) for ids, mask in sequences)


def pack_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[Piece]]],
    max_tokens: int | None = None,
    share: bool = True,
) -> PackedBatch:
    """Prompts with their continuations (ids, mask), in the continuations' order.

    share=True stores a prompt once, as the parent of its continuations; a group of more than
    `max_tokens` is cut into trees that fit, each with the prompt; an empty prompt leaves its
    continuations as sequences of their own. share=False repeats the prompt,
    unscored, before each continuation.
    """
    if not share:
        return pack(
            [
                ([*prompt, *ids], [0] * len(prompt) + list(mask))
                for prompt, continuations in groups
                for ids, mask in continuations
            ]
        )
    return _pack(_trees(groups, max_tokens))


def _trees(
    groups: Sequence[tuple[Sequence[int], Sequence[Piece]]], max_tokens: int | None
) -> Iterable[tuple[Sequence[int], Sequence[int], int, int]]:
    count = 0
    for prompt, continuations in groups:
        root, size = -1, 0
        for ids, mask in continuations:
            if not prompt:
                yield ids, mask, 0, -1
                count += 1
                continue
            if root < 0 or (max_tokens is not None and size + len(ids) > max_tokens):
                root, size = count, len(prompt)
                yield prompt, [0] * len(prompt), 0, -1
                count += 1
            yield ids, mask, len(prompt), root
            count += 1
            size += len(ids)


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
