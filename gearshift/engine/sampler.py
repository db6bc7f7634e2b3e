"""From logits to tokens and their log-probabilities. A pure function of logits, uniforms and each
row's history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gearshift.kernels.reference import inverse_cdf
from gearshift.types import SamplingParams, TokenScore

Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""`Kernels.sample`."""
Written = tuple[list[int], list[int]]
"""A row's prompt, and its completion so far."""
_LOGITS_AT_ONCE = 2**20
"""How many logits `token_scores` reads at a time: what it makes of them stays in a CPU's caches."""


def sample(
    draw: Draw,
    logits_BV: Tensor,
    uniforms_B: Tensor,
    params: Sequence[SamplingParams],
    written: Sequence[Written],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token for each row, by inverse CDF; at temperature 0 take the most likely one.

    Args: `draw` does it for rows that ask for nothing but a temperature; logits [B, V] as the head
    gave them; uniforms [B] float64 in (0, 1); each row's parameters, and what it has `written`,
    which penalties and bad words depend on.
    Returns [B] tokens; [B] float32 log-probs under softmax(logits / temperature); and the same
    under the distribution that the token was drawn from. See `Completion` for which is which.
    """
    device = logits_BV.device
    temperature_B = torch.tensor([p.temperature for p in params], device=device)
    tokens_B = torch.empty(len(params), dtype=torch.int64, device=device)
    logprobs_B = torch.empty(len(params), device=device)
    draw(logits_BV, temperature_B, uniforms_B, tokens_B, logprobs_B)
    rows = [i for i, p in enumerate(params) if adjusts(p)]
    if not rows:
        return tokens_B, logprobs_B, logprobs_B
    # From here on, B counts only the rows that need more.
    policy_BV = logits_BV[rows].float()
    temperature_B1 = temperature_B[rows, None]
    scale_B1 = torch.where(temperature_B1 > 0, temperature_B1, 1.0)
    adjusted_BV = policy_BV.clone()
    for i, row in enumerate(rows):
        _adjust(adjusted_BV[i], params[row], *written[row])
    adjusted_BV /= scale_B1
    for p in {params[row] for row in rows}:
        own = [i for i, row in enumerate(rows) if params[row] == p]
        adjusted_BV[own] = truncate(adjusted_BV[own], p)
    drawn_BV = torch.log_softmax(adjusted_BV, -1)
    at_B1 = torch.where(
        temperature_B1 > 0,
        inverse_cdf(drawn_BV.exp(), uniforms_B[rows])[:, None],
        adjusted_BV.argmax(-1, keepdim=True),
    )
    tokens_B[rows] = at_B1[:, 0]
    drawn_B = logprobs_B.clone()
    logprobs_B[rows] = torch.log_softmax(policy_BV / scale_B1, -1).gather(1, at_B1)[:, 0]
    drawn_B[rows] = drawn_BV.gather(1, at_B1)[:, 0]
    return tokens_B, logprobs_B, drawn_B


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
        drop_BV[:, 0] = False  # a top_p that float32 rounds to 0 too
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    if params.min_p > 0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + torch.log(torch.tensor(params.min_p))
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    return logits_BV


def adjusts(p: SamplingParams) -> bool:
    """Whether more than the temperature shapes the distribution."""
    truncates = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    penalizes = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
    return truncates or penalizes or bool(p.logit_bias or p.bad_words or p.min_new_tokens)


def reads_logits(p: SamplingParams) -> bool:
    """Whether each token needs the logits that it was drawn from, outside the decode step."""
    return adjusts(p) or p.top_logprobs is not None


def token_scores(logits_BV: Tensor, tokens_B: Tensor, top: int) -> list[TokenScore]:
    """The score of one token of each row, with the `top` most likely tokens, or all if there are
    fewer. log p = logit - log sum_v exp(logit_v), in float32.
    """
    B, V = logits_BV.shape
    rows = max(1, _LOGITS_AT_ONCE // V)
    return [
        score
        for first in range(0, B, rows)
        for score in _scores(logits_BV[first : first + rows].float(), tokens_B[first:], top)
    ]


def _scores(logits_BV: Tensor, tokens: Tensor, top: int) -> list[TokenScore]:
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    ids_BK = _most_likely(logits_BV, min(top, logits_BV.shape[1]))
    own_B1 = logprobs_BV.gather(1, tokens[: len(logits_BV), None])
    figures_BK = logprobs_BV.gather(1, ids_BK)
    rows = zip(own_B1[:, 0].tolist(), ids_BK.tolist(), figures_BK.tolist(), strict=True)
    return [TokenScore(own, tuple(zip(ids, all_, strict=True))) for own, ids, all_ in rows]


def _most_likely(logits_BV: Tensor, top: int) -> Tensor:
    """[B, K]: the ids of the largest logits in order; of equal ones the smallest id first, which
    `topk` does not promise, and which `argmax` and so greedy sampling take.
    """
    B, _ = logits_BV.shape
    if top == 0:
        return torch.empty((B, 0), dtype=torch.int64, device=logits_BV.device)
    smallest_B1 = logits_BV.topk(top, -1).values[:, -1:]
    candidates_BV = ~(logits_BV < smallest_B1)  # also what is not a number: there are K or more
    rows, ids = candidates_BV.nonzero(as_tuple=True)
    order = logits_BV[rows, ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]  # by row, in it by logit, then by id
    counts_B = candidates_BV.sum(-1)
    firsts_B1 = (counts_B.cumsum(0) - counts_B)[:, None]
    return ids[order][firsts_B1 + torch.arange(top, device=ids.device)]


def _adjust(logits_V: Tensor, p: SamplingParams, prompt: list[int], completion: list[int]) -> None:
    """Penalties, bias and bad words, in place and in this order (Hugging Face's).

    Frequency and presence: logit_v -= count_v * frequency_penalty + (count_v > 0) *
    presence_penalty, where count_v counts token v in the completion (OpenAI's API reference).
    """
    history = prompt + completion
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(history)), device=logits_V.device)
        held = logits_V[seen]
        logits_V[seen] = torch.where(
            held > 0, held / p.repetition_penalty, held * p.repetition_penalty
        )
    if completion and (p.frequency_penalty or p.presence_penalty):
        counts = Counter(completion)
        tokens, times = torch.tensor([*counts.items()], device=logits_V.device).T
        logits_V[tokens] -= times * p.frequency_penalty + p.presence_penalty
    for token, bias in p.logit_bias:
        logits_V[token] += bias
    for *before, last in p.bad_words:
        if not before or history[-len(before) :] == before:
            logits_V[last] = -torch.inf
