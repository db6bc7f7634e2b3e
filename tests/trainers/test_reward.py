"""The reward model: packed and padded training are the same, loss and gradient."""

import pytest
import torch

from gearshift.models.classifier import sequence_scores
from gearshift.models.load import load_classifier
from gearshift.trainers.reward import Pair, PairScorer
from tests.trainers.rl_runs import TINY

PAIRS = [
    Pair([5, 6, 7, 8, 9], [5, 6, 7, 11]),
    Pair([20, 21, 22], [20, 21, 22, 23, 24]),  # one side is the other's beginning
    Pair([30, 31], [40, 41, 42]),  # nothing in common
]


@pytest.mark.parametrize("max_tokens", [4096, 8])
def test_packed_scores_are_padded_scores(max_tokens: int) -> None:
    model, plain = load_classifier(TINY), load_classifier(TINY)
    plain.config.pad_token_id = 0
    scorer = PairScorer(model)
    assert scorer._states is not None
    weights = {id(p): float(i + 1) for i, p in enumerate(PAIRS)}
    micros = scorer.micros(PAIRS, max_tokens)
    assert sorted(id(p) for m in micros for p in m) == sorted(weights)
    assert len(micros) > 1 or max_tokens > 8
    for micro in micros:
        scores = scorer(micro)
        padded = sequence_scores(plain, [side for pair in micro for side in pair.sides])
        assert torch.allclose(scores, padded, atol=1e-5)
        factor = torch.tensor([weights[id(p)] * s for p in micro for s in (1.0, -0.5)])
        (scores * factor).sum().backward()
        (padded * factor).sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
