"""What the generation gear computes of given tokens, for the comparison with Hugging Face's forward
(`models/check.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.engine.cached_forward import CachedForward
from gearshift.kernels.specs import BLOCK, AttentionMetadata
from gearshift.models.check import NEW


def blocks_of(tokens: list[list[int]]) -> int:
    """Blocks that `decode_given` needs."""
    return len(tokens) * -(-max(map(len, tokens)) // BLOCK)


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
