"""Inverse CDF and truncation the slow way: Python floats, one row, one token at a time."""

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
