"""The tensor functions of `reference.py` with the attention of a GPU: in chunks of bounded memory,
by kernels that make no plan for a shape. They run on any device, and tests run them on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from gearshift.kernels.attention import PackedSequences, attend_chunk, stores_scores
from gearshift.kernels.reference import Kernels, cached
from gearshift.kernels.specs import BLOCK, AttentionMetadata, AttentionOptions


class ChunkedKernels(Kernels):
    """Tensor functions for a GPU."""

    def attend(
        self, query: Tensor, store: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        T, Q, D = query.shape
        keys, values = cached(store, D)
        heads = Q if stores_scores(query, options) else 1
        out = query.new_empty((T + 1, Q, D))  # the last row takes what fills up
        for rows in metadata.rows:
            for chunk in rows.chunks(options.window, heads):
                [part], [some] = rows.parts, chunk.keys
                blocks = metadata.block_tables[part.which, some.start // BLOCK : some.stop // BLOCK]
                # [N, W, K, D / 2, P, 2] and [N, W, K, P / 2, D, 2] -> [N, W * P, K, D]
                key = keys[blocks].permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 2)
                value = values[blocks].permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
                mine = query[rows.tokens[:, chunk.queries]]
                seen = attend_chunk(mine, key, value, rows, chunk, options)
                out[rows.targets[:, chunk.queries]] = seen
        return out[:-1]

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        options: AttentionOptions,
    ) -> Tensor:
        return sequences.attend_chunked(q, k, v, options)
