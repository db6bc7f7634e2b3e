"""What the generation gear computes of given tokens: their log-probs, and the logits for the
comparison with Hugging Face's forward (`models/check.py`). It knows no request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.engine.cached_forward import CachedForward
from gearshift.engine.sampler import token_scores
from gearshift.kernels.specs import BLOCK, AttentionMetadata
from gearshift.models.check import NEW
from gearshift.types import TokenScore

_LOGITS_AT_ONCE = 2**25
"""How many logits a forward of `score_given` makes at most: 128 MiB in float32."""


def blocks_of(tokens: list[list[int]]) -> int:
    """Blocks that `decode_given` needs."""
    return len(tokens) * -(-max(map(len, tokens)) // BLOCK)


def score_given(
    forward: CachedForward, ids: list[int], top: int, vocabulary: int, most: int
) -> list[TokenScore]:
    """The score of each token after the first, with the `top` most likely ones. At most `most`
    tokens are computed at a time, and fewer where the vocabulary is large, so that [T, V] logits
    never exist. The cache has room for the tokens.
    """
    device = forward.model.device
    tokens = torch.tensor(ids, device=device)
    table = 1 + torch.arange(blocks_of([ids]), device=device)[None]
    size, scores = max(1, min(most, _LOGITS_AT_ONCE // vocabulary)), []
    for first in range(0, len(ids) - 1, size):
        positions = torch.arange(first, min(first + size, len(ids) - 1), device=device)
        rows = torch.zeros_like(positions)
        logits = forward(tokens[positions], AttentionMetadata(rows, positions, table))
        with forward.kernels.batch_invariant():
            scores += token_scores(logits, tokens[positions + 1], top)
    return scores


def decode_given(forward: CachedForward, tokens: list[list[int]]) -> list[Tensor]:
    """The logits [S, V] of each sequence's last tokens but one, S at most `NEW`, as a batch that
    writes them would see them.
    """
    new = min(NEW, *(len(row) - 1 for row in tokens))
    if new == 0:
        return []
    device, rows = forward.model.device, len(tokens)
    width = blocks_of(tokens) // rows
    table = 1 + torch.arange(rows * width, device=device).view(rows, width)
    known = torch.tensor([len(row) - new for row in tokens], device=device)
    each = torch.arange(rows, device=device)
    ids = torch.tensor([t for row in tokens for t in row[:-new]], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in known.tolist()])
    prompts = AttentionMetadata(
        each.repeat_interleave(known), positions, table, known.cumsum(0) - 1
    )
    steps = [forward(ids, prompts).float().clone()]
    for step in range(new - 1):
        newest = torch.tensor([row[step - new] for row in tokens], device=device)
        steps.append(forward(newest, AttentionMetadata(each, known + step, table)).float().clone())
    return list(torch.stack(steps, 1))
