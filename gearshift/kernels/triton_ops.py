"""Kernels of a GPU: attention of decode steps in Triton, and decode steps as CUDA graphs.

The Triton kernels run in Triton's interpreter too (TRITON_INTERPRET=1), where tests compare them
with the tensor functions on a CPU. R is Q / K here, W the columns of the block tables, and M the
rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gearshift.errors import KernelError
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.cuda_graphs import CudaGraphs
from gearshift.kernels.specs import BLOCK, TILE, AttentionMetadata, AttentionOptions, Prepare, Run

_TOGETHER = 4
"""Blocks that one turn of a kernel's loop reads at most."""
_SHARED_BYTES = 96 * 1024
"""Shared memory that a program takes at most, without its sums: sm_86 and sm_89 have 99 KB."""


@triton.jit  # type: ignore[untyped-decorator]
def _continued(  # type: ignore[no-untyped-def]
    q, top, total, summed, store, blocks_at, from_block, end, begin,
    scaling, softcap, stride, keys_at, values_at,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) of queries [M, DP] over the positions
    begin..end from block `from_block` on. It continues from (top [M], total [M], summed [M, DP]).
    `end` and `begin` are [M]; it does not look at positions outside.
    """
    d = tl.arange(0, DP)
    n = tl.arange(0, N * P)
    inside = n % P
    key_at = keys_at + (d // 2)[:, None] * (2 * P) + inside[None, :] * 2 + (d % 2)[:, None]
    value_at = values_at + (inside // 2)[:, None] * (2 * D) + d[None, :] * 2 + (inside % 2)[:, None]
    last = tl.max(end)
    for block in range(from_block, (last + P - 1) // P, N):
        position = block * P + n
        seen = position < last
        at = tl.load(blocks_at + position // P, mask=seen, other=0) * stride
        in_head = seen[None, :] & (d < D)[:, None]
        key = tl.load(store + at[None, :] + key_at, mask=in_head, other=0.0)
        score = tl.dot(q, key, input_precision="ieee") * scaling
        if softcap > 0:
            score = softcap * (2.0 / (1.0 + tl.exp(-2.0 * score / softcap)) - 1.0)
        mine = (position[None, :] < end[:, None]) & (position[None, :] >= begin[:, None])
        score = tl.where(mine, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(score - shift[:, None])
        shrink = tl.exp(top - shift)
        in_head = seen[:, None] & (d < D)[None, :]
        value = tl.load(store + at[:, None] + value_at, mask=in_head, other=0.0)
        total = total * shrink + tl.sum(weight, 1)
        summed = summed * shrink[:, None]
        summed += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = new_top
    return top, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _shared_part(  # type: ignore[no-untyped-def]
    query, store, table, common, tops, totals, sums,
    B, W, query_stride, scaling, softcap, stride,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attention of M queries of one tile and one key head over the blocks that all rows of the tile
    share.
    """
    tile, k = tl.program_id(0), tl.program_id(1)
    blocks = tl.load(common + tile)
    if blocks > 0:
        m = tl.program_id(2) * M + tl.arange(0, M)
        d = tl.arange(0, DP)
        row = tile * TILE + m // R
        head = k * R + m % R
        here = (m < TILE * R) & (row < B)
        at = row[:, None] * query_stride + head[:, None] * D + d[None, :]
        q = tl.load(query + at, mask=here[:, None] & (d < D)[None, :], other=0.0)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        summed = tl.zeros([M, DP], tl.float32)
        end = tl.zeros([M], tl.int64) + blocks * P
        begin = tl.zeros([M], tl.int64)
        top, total, summed = _continued(
            q, top, total, summed, store, table + tile * TILE * W, 0, end, begin,
            scaling, softcap, stride, k * P * D, (K + k) * P * D, D, DP, P, N,
        )  # fmt: skip
        place = row * (K * R) + head
        tl.store(tops + place, top, mask=here)
        tl.store(totals + place, total, mask=here)
        whole = here[:, None] & (d < D)[None, :]
        tl.store(sums + place[:, None] * D + d[None, :], summed, mask=whole)


@triton.jit  # type: ignore[untyped-decorator]
def _own_part(  # type: ignore[no-untyped-def]
    query, store, table, positions, common, tops, totals, sums, out,
    W, query_stride, scaling, softcap, window, stride,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attention of one row and one key head: from the shared part to the row's own position."""
    row, k = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    here = m < R
    head = k * R + m
    whole = here[:, None] & (d < D)[None, :]
    q = tl.load(query + row * query_stride + head[:, None] * D + d[None, :], mask=whole, other=0.0)
    position = tl.load(positions + row)
    end = tl.zeros([M], tl.int64) + position + 1
    begin = tl.zeros([M], tl.int64)
    blocks = tl.load(common + row // TILE)
    first = blocks
    if window > 0:
        blocks *= 0  # there is no shared part; the type stays
        begin = tl.maximum(end - window, 0)
        first = tl.maximum(position + 1 - window, 0) // P
    place = row * (K * R) + head
    known = here & (tl.zeros([M], tl.int64) + blocks > 0)
    top = tl.load(tops + place, mask=known, other=float("-inf"))
    total = tl.load(totals + place, mask=known, other=0.0)
    whole_known = known[:, None] & (d < D)[None, :]
    summed = tl.load(sums + place[:, None] * D + d[None, :], mask=whole_known, other=0.0)
    top, total, summed = _continued(
        q, top, total, summed, store, table + row * W, first, end, begin,
        scaling, softcap, stride, k * P * D, (K + k) * P * D, D, DP, P, N,
    )  # fmt: skip
    summed = summed / total[:, None]
    at = place[:, None] * D + d[None, :]
    tl.store(out + at, summed.to(out.dtype.element_ty), mask=whole)


class TritonKernels(ChunkedKernels):
    """The tensor functions, except for attention in decode steps, and for captured steps."""

    captures_ahead = True

    def __init__(self) -> None:
        self._graphs = CudaGraphs()

    def padded_rows(self, rows: int) -> int:
        """The next power of two, or multiple of 64, so that few graphs serve all sizes."""
        return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64

    def capture(self, prepare: Prepare, run: Run) -> Run | None:
        return self._graphs.capture(prepare, run)

    def workspace_bytes(self) -> int:
        return self._graphs.bytes()

    def attend(
        self, query: Tensor, store: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        B, Q, D = query.shape
        if len(metadata.block_tables) != B:  # a prefill
            return super().attend(query, store, metadata, options)
        K = store.shape[2]
        R, W = Q // K, metadata.block_tables.shape[1]
        window, softcap = options.window or 0, options.softcap or 0.0
        common = metadata.common
        tops, totals = (query.new_empty(B * Q, dtype=torch.float32) for _ in range(2))
        sums = query.new_empty((B * Q, D), dtype=torch.float32)
        out = torch.empty((B, Q, D), dtype=query.dtype, device=query.device)
        numbers = (query.stride(0), options.scaling, softcap)
        DP = max(16, triton.next_power_of_2(D))
        shape: dict[str, Any] = {"R": R, "K": K, "D": D, "DP": DP, "P": BLOCK, "TILE": TILE}
        with torch.cuda.device_of(query), _named_errors(D):  # Triton takes the current device
            if not window:  # rows of a window see different blocks
                M, N = tile_size(TILE * R, DP, query.element_size())
                _shared_part[len(common), K, triton.cdiv(TILE * R, M)](
                    query, store, metadata.block_tables, common, tops, totals, sums, B, W,
                    *numbers, store.stride(0), **shape, M=M, N=N,
                )  # fmt: skip
            M, N = tile_size(R, DP, query.element_size(), whole=True)
            _own_part[B, K](
                query, store, metadata.block_tables, metadata.positions, common, tops, totals, sums,
                out, W, *numbers, window, store.stride(0), **shape, M=M, N=N,
            )  # fmt: skip
        return out


def tile_size(queries: int, size: int, item: int, whole: bool = False) -> tuple[int, int]:
    """(M, N): how many of these queries a program takes (all if `whole`) and how many blocks of
    keys at once, so that its shared memory fits on every GPU. `size` is DP; `item` is the bytes of
    a number.

    Its shared memory is N P DP keys and as many values, M DP queries and M N P weights. Triton
    keeps keys and values of 16 bits in one place.
    """
    M, N = max(16, triton.next_power_of_2(queries)), _TOGETHER
    copies = 2 if item == 4 else 1

    def bytes_of() -> int:
        return (copies * N * BLOCK * size + M * size + M * N * BLOCK) * item

    while bytes_of() > _SHARED_BYTES and (N > 1 or (M > 16 and not whole)):
        if M > 16 and not whole:
            M //= 2
        else:
            N //= 2
    return M, N


@contextmanager
def _named_errors(head_size: int) -> Iterator[None]:
    """Errors of Triton's compiler become a `KernelError`."""
    try:
        yield
    except OutOfResources as error:
        raise KernelError(
            f"This GPU is too small for the attention kernel of {head_size} numbers a head "
            f"({error}); set model.dtype=bfloat16, or model.device=cpu."
        ) from error
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise KernelError(
            "Triton finds no C compiler, which its kernels need; install gcc, or name a compiler "
            "in CC."
        ) from error
