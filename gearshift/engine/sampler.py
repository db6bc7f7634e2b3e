"""From logits to tokens and their log-probabilities in one pass. A pure function of logits and
uniforms.

Legend: B rows, V vocabulary, G blocks of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.types import SamplingParams

_BLOCK = 256


def sample(logits_BV: Tensor, uniforms_B: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF; with temperature 0 take the most likely.

    Args: logits [B, V] float32; uniforms [B] float64 in (0, 1), one a row (not read when greedy).
    Returns tokens [B] int64 and their log-probabilities [B] float32 under softmax(logits /
    temperature), *before* top-k, top-p and min-p: the policy whose ratios training takes.
    """
    if params.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        logits_BV = logits_BV / params.temperature
        norm_B = torch.logsumexp(logits_BV, -1)
        kept_BV = truncate(logits_BV, params)
        tokens_B = inverse_cdf(torch.exp(kept_BV - norm_B[:, None]), uniforms_B)
        return tokens_B, logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - norm_B
    chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, chosen_B - torch.logsumexp(logits_BV, -1)


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] int64: the token at which the running sum of weights first exceeds uniform * total.

    Two levels, so that no running sum goes over all of V: first the block, then the token inside
    it. Weights need not be normalised; a token of weight 0 is never drawn.
    """
    B, V = weights_BV.shape
    blocks = -(-V // _BLOCK)
    padded = torch.nn.functional.pad(weights_BV, (0, blocks * _BLOCK - V)).view(B, blocks, _BLOCK)
    block_ends_BG = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = (uniforms_B * block_ends_BG[:, -1])[:, None]
    block_B1 = torch.searchsorted(block_ends_BG, target_B1, right=True).clamp(max=blocks - 1)
    before_B1 = torch.where(block_B1 > 0, block_ends_BG.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, block_B1[:, :, None].expand(B, 1, _BLOCK)).squeeze(1)
    ends = inside.double().cumsum(-1)
    token_B1 = torch.searchsorted(ends, target_B1 - before_B1, right=True)
    # Rounding may push the target past the block's own sum: take its last token that can be drawn.
    slots = torch.arange(_BLOCK, device=weights_BV.device)
    last_B1 = torch.where(inside > 0, slots, 0).amax(-1, keepdim=True)
    return (block_B1 * _BLOCK + torch.minimum(token_B1, last_B1)).squeeze(1)


def truncate(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """[B, V] logits with -inf where top-k, top-p or min-p drop the token; the same tensor if none
    is asked.

    Top-p counts the probability of what top-k left, as Hugging Face does. The most likely token
    always stays.
    """
    if params.top_k and params.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(params.top_k, -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if params.top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = torch.softmax(ordered_BV, -1).cumsum(-1)
        drop_BV = (before_BV - torch.softmax(ordered_BV, -1)) >= params.top_p
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    if params.min_p > 0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + torch.log(torch.tensor(params.min_p))
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    return logits_BV
