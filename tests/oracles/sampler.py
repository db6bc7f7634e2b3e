"""Inverse CDF, truncation, penalties and scores the slow way: Python floats, one row, one token at
a time.
"""

import math


def inverse_cdf(weights: list[float], uniform: float) -> int:
    """The first token whose running sum exceeds uniform * total."""
    target, running = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def kept(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that top-k, then top-p, then min-p leave."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(logits[i]) for i in order]
    total, before, nucleus = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if before / total < top_p:
            nucleus.append(token)
        before += weight
    best = math.exp(logits[order[0]])
    return {i for i in nucleus if math.exp(logits[i]) >= min_p * best}


def penalized(
    logits: list[float], completion: list[int], frequency: float, presence: float
) -> list[float]:
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    return [
        mu - completion.count(j) * frequency - (completion.count(j) > 0) * presence
        for j, mu in enumerate(logits)
    ]


def log_softmax(logits: list[float]) -> list[float]:
    """log p of each token."""
    most = max(logits)
    norm = most + math.log(sum(math.exp(x - most) for x in logits))
    return [x - norm for x in logits]


def most_likely(logits: list[float], top: int) -> list[int]:
    """The first tokens by logit; of equal ones the smallest id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top]
