"""The block cache gives every block back, and finds only what it holds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.engine.block_cache import KVCache
from gearshift.kernels.specs import BLOCK
from gearshift.runtime.allocator import resident_bytes

A, B = [1] * BLOCK, [2] * BLOCK


def filled(blocks: int) -> KVCache:
    cache = KVCache(blocks)
    cache.open(blocks)
    return cache


def test_a_known_beginning_is_found_but_never_the_whole_prompt() -> None:
    cache = filled(8)
    blocks = [cache.allocate() for _ in range(3)]
    cache.register_prefix(blocks, [*A, *B, 7])
    assert cache.match_prefix([*A, *B, 9, 9]) == blocks[:2]
    assert cache.match_prefix(A + B) == blocks[:1]  # one token must be left to predict from
    assert cache.match_prefix([*B, *A, 1]) == []
    cache.release(blocks)
    assert cache.match_prefix([*A, 1]) == blocks[:1] and cache.available == 8
    cache.reset_prefix_cache()
    assert cache.match_prefix([*A, 1]) == [] and cache.available == 8


def test_a_run_whose_beginning_was_evicted_is_not_mistaken() -> None:
    cache = filled(2)
    blocks = [cache.allocate(), cache.allocate()]
    cache.register_prefix(blocks, A + B)
    cache.release(blocks)
    taken = cache.allocate()  # the end goes first
    assert cache.match_prefix([*A, *B, 1]) == blocks[:1] and taken == blocks[1]
    other = cache.allocate()
    cache.register_prefix([other, taken], B + A)
    assert cache.match_prefix([*A, *B, 1]) == []
    assert cache.match_prefix([*B, *A, 1]) == [other, taken]


def test_opening_blocks_moves_nothing_and_takes_no_memory_before_they_are_written() -> None:
    cache = KVCache(1 << 14)
    cache.open(2)
    block, like = cache.allocate(), torch.zeros(1, 8, 64)
    store, before = cache.layer(0, like), resident_bytes()
    store[block] = 5
    cache.open(6)
    assert cache.available == 5 and cache.layer(0, like).data_ptr() == store.data_ptr()
    assert (store[block] == 5).all() and not store[-1].any()
    assert store.nbytes > 1 << 30
    assert resident_bytes() - before < 1 << 26
    assert cache.bytes() == 7 * store[0].nbytes
    cache.open(1 << 20)
    assert cache.blocks == cache.capacity == 1 << 14


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=120))
@settings(max_examples=100, deadline=None)
def test_references_are_counted(moves: list[tuple[int, int]]) -> None:
    """Random use: a block is never in two hands, and all come back."""
    cache = filled(10)
    held: list[list[int]] = []
    for move, n in moves:
        if move == 0 and cache.available >= 3:
            tokens = [n % 3] * BLOCK + [n % 2] * BLOCK + [n] * BLOCK
            known = cache.match_prefix(tokens)
            for block in known:
                cache.share(block)
            if cache.available < 3 - len(known):
                cache.release(known)
                continue
            fresh = [cache.allocate() for _ in range(3 - len(known))]
            assert not set(fresh) & {b for blocks in held for b in blocks}
            held.append(known + fresh)
            cache.register_prefix(held[-1], tokens)
        elif move == 1 and held:
            cache.release(held.pop(n % len(held)))
        elif move == 2:
            cache.reset_prefix_cache()
    in_use = {b for blocks in held for b in blocks}
    assert cache.available == 10 - len(in_use)
    for blocks in held:
        cache.release(blocks)
    assert cache.available == 10
