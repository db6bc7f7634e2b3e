"""Attention of packed sequences, token by token, in float64."""

import torch
from torch import Tensor

from gearshift.batch import PackedBatch
from gearshift.kernels.specs import AttentionOptions


def visible(batch: PackedBatch, window: int | None) -> list[list[int]]:
    """The tokens that each token may look at."""
    cu, positions = batch.cu_seqlens.tolist(), batch.position_ids.tolist()
    seen = []
    for n, parent in enumerate(batch.parents.tolist()):
        line = [n]
        while parent >= 0:
            line.append(parent)
            parent = int(batch.parents[parent])
        tokens = [j for one in line for j in range(cu[one], cu[one + 1])]
        for i in range(cu[n], cu[n + 1]):
            far = {j: positions[i] - positions[j] for j in tokens}
            seen.append([j for j in tokens if far[j] >= 0 and (not window or far[j] < window)])
    return seen


def attention(batch: PackedBatch, q: Tensor, k: Tensor, v: Tensor, o: AttentionOptions) -> Tensor:
    """[T, heads, D] each -> [T, Q, D]; gradients flow."""
    head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    rows = []
    for i, seen in enumerate(visible(batch, o.window)):
        scores = (k[seen][:, head] * q[i]).sum(-1) * o.scaling
        if o.softcap is not None:
            scores = torch.tanh(scores / o.softcap) * o.softcap
        rows.append((torch.softmax(scores, 0)[..., None] * v[seen][:, head]).sum(0))
    return torch.stack(rows)
