"""The sampler draws rightly, reports the untruncated policy, and never draws what was dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.engine.sampler import inverse_cdf, sample, truncate
from gearshift.types import SamplingParams
from tests.oracles import sampler as oracle

WEIGHT = st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0])
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=700).filter(any)


@given(WEIGHTS, st.floats(1e-9, 1 - 1e-9))
@settings(max_examples=200, deadline=None)
def test_inverse_cdf_is_the_oracles(weights: list[float], uniform: float) -> None:
    # The weights are sums of powers of two, so both running sums are exact.
    token = int(inverse_cdf(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)))
    assert token == oracle.inverse_cdf(weights, uniform)
    assert weights[token] > 0


@pytest.mark.parametrize("uniform", [1e-300, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 511, 512]] = torch.tensor([0.1, 0.2, 0.3])
    u = torch.tensor([uniform], dtype=torch.float64)
    token, logprob = sample(logits, u, SamplingParams())
    assert int(token) in (300, 512) and torch.isfinite(logprob).all()


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    params = SamplingParams(temperature=0.7)
    tokens, logprobs = sample(logits.expand(20_000, 5), uniforms, params)
    p = torch.softmax(logits / 0.7, -1)
    assert torch.allclose(torch.bincount(tokens, minlength=5) / 20_000, p, atol=2e-4)
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


@given(
    st.lists(st.integers(-400, 400), min_size=2, max_size=40, unique=True),
    st.integers(0, 12),
    st.sampled_from([0.05, 0.3, 0.77, 0.95, 1.0]),
    st.sampled_from([0.0, 0.03, 0.4]),
)
@settings(max_examples=150, deadline=None)
def test_truncation_keeps_the_oracles_tokens(
    hundredths: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.tensor([[x / 100 for x in hundredths]], dtype=torch.float64)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    left = torch.isfinite(truncate(logits, params))[0].nonzero().flatten().tolist()
    assert set(left) == oracle.kept(logits[0].tolist(), top_k, top_p, min_p)


def test_log_probs_are_of_the_policy_before_truncation() -> None:
    logits = torch.randn(64, 50)
    u = torch.rand(64, dtype=torch.float64)
    tokens, logprobs = sample(logits, u, SamplingParams(top_k=3, temperature=0.5))
    assert (tokens[:, None] == logits.topk(3).indices).any(1).all()
    expected = torch.log_softmax(logits / 0.5, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_greedy_takes_the_most_likely_and_scores_it_at_temperature_one() -> None:
    logits = torch.randn(8, 300)
    tokens, logprobs = sample(logits, torch.rand(8).double(), SamplingParams(temperature=0.0))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1).amax(-1), atol=1e-5)
