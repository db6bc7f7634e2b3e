"""Packing: shared and repeated prompts score the same tokens in the same order; slices and joins
undo each other.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.batch import PackedBatch, pack, pack_groups

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=6)
PIECE = TOKENS.flatmap(
    lambda ids: st.tuples(
        st.just(ids), st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))
    )
)
GROUPS = st.lists(
    st.tuples(TOKENS, st.lists(PIECE, min_size=1, max_size=4)), min_size=1, max_size=4
)


def context(batch: PackedBatch, index: int) -> list[int]:
    """The tokens that the state at `index` has seen, by walking the parents."""
    sequence = int((batch.cu_seqlens <= index).sum()) - 1
    start = int(batch.cu_seqlens[sequence])
    own = batch.input_ids[start : index + 1].tolist()
    parent = int(batch.parents[sequence])
    return own if parent < 0 else [*context(batch, int(batch.cu_seqlens[parent + 1]) - 1), *own]


@given(GROUPS, st.sampled_from([None, 7, 12]))
@settings(max_examples=80, deadline=None)
def test_shared_scores_what_repeated_scores(groups: list, micro_batch_tokens: int | None) -> None:
    shared = pack_groups(groups)
    if micro_batch_tokens is not None:
        parts = list(shared.split_groups(micro_batch_tokens))
        assert all(len(p) <= micro_batch_tokens or len(p.parents) == 2 for p in parts)
        shared = PackedBatch.join(parts)
    repeated = pack_groups(groups, share=False)
    assert shared.targets.tolist() == repeated.targets.tolist()
    seen = [[context(batch, int(i)) for i in batch.logit_indices] for batch in (shared, repeated)]
    assert seen[0] == seen[1]
    assert shared.position_ids.tolist() == [len(context(shared, i)) - 1 for i in range(len(shared))]
    assert [c for c in shared.completion_lengths.tolist() if c] == [
        c for c in repeated.completion_lengths.tolist() if c
    ]


@given(GROUPS, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_splitting_and_joining(groups: list, micro_batch_tokens: int) -> None:
    batch = pack_groups(groups)
    values = torch.rand(int(batch.loss_mask.sum()))
    batch = batch.with_scored(advantages=values)
    parts = list(batch.split(micro_batch_tokens))
    assert all(len(p) <= micro_batch_tokens or len(p.prompt_groups()) == 1 for p in parts)
    whole = PackedBatch.join(parts)
    for name in ("input_ids", "position_ids", "cu_seqlens", "parents", "loss_mask", "advantages"):
        assert torch.equal(getattr(whole, name), getattr(batch, name)), name
    assert torch.equal(whole.scored("advantages"), values)


def test_sequences_without_a_wanted_token_are_dropped_and_their_prompt_kept() -> None:
    batch = pack_groups([([1], [([2], [1])]), ([3], [([4], [1]), ([5, 6], [1, 1])])])
    batch = batch.with_scored(advantages=torch.tensor([2.0, 4.0, 5.0, 6.0]))
    kept = batch.select_sequences(batch.input_ids == 6)
    assert kept.input_ids.tolist() == [3, 5, 6] and kept.parents.tolist() == [-1, 0]
    assert kept.cu_seqlens.tolist() == [0, 1, 3]
    assert kept.position_ids.tolist() == [0, 1, 2]
    assert kept.scored("advantages").tolist() == [5.0, 6.0]
    both = batch.select_sequences((batch.input_ids == 2) | (batch.input_ids == 4))
    assert both.input_ids.tolist() == [1, 2, 3, 4] and both.parents.tolist() == [-1, 0, -1, 2]
    assert batch.select_sequences(batch.input_ids == 77).input_ids.tolist() == [1, 2]


def test_a_scored_token_needs_a_predictor() -> None:
    with pytest.raises(ValueError, match="no parent"):
        _ = pack([([1, 2], [1, 1])]).logit_indices
    with pytest.raises(ValueError, match="advantages"):
        pack([([1, 2], [0, 1])]).scored("advantages")
