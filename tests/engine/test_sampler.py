"""The sampler draws rightly, reports the untruncated policy, and never draws what was dropped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from gearshift.engine.sampler import sample as sample_rows
from gearshift.engine.sampler import token_scores, truncate
from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.reference import Kernels, inverse_cdf
from gearshift.types import SamplingParams
from tests.device import device
from tests.oracles import sampler as oracle

pytestmark = pytest.mark.usefixtures("made_on_device")

KERNELS = [Kernels(), kernels_for(torch.zeros(1, device=device()))]


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    params: SamplingParams,
    history: tuple[int, ...] = (),
    kernels: Kernels = KERNELS[0],
    completion: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row's parameters and tokens for all rows; the history is the prompt."""
    rows, written = [params] * len(logits), [([*history], [*completion])] * len(logits)
    return sample_rows(kernels.sample, logits.contiguous(), uniforms, rows, written)


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
    for kernels in KERNELS:
        token, logprob, _ = sample(logits, u, SamplingParams(), kernels=kernels)
        assert int(token) in (300, 512) and torch.isfinite(logprob).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=["torch", "native"])
def test_frequencies_are_the_probabilities(kernels: Kernels) -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    params = SamplingParams(temperature=0.7)
    tokens, logprobs, _ = sample(logits.expand(20_000, 5), uniforms, params, kernels=kernels)
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
    tokens, logprobs, drawn = sample(logits, u, SamplingParams(top_k=3, temperature=0.5))
    top = logits.topk(3).indices
    assert (tokens[:, None] == top).any(1).all()
    expected = torch.log_softmax(logits / 0.5, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    left = torch.log_softmax(logits.gather(1, top) / 0.5, -1)
    assert torch.allclose(drawn, left[tokens[:, None] == top], atol=1e-5)


def test_greedy_takes_the_most_likely_and_scores_it_at_temperature_one() -> None:
    logits = torch.randn(8, 300)
    for kernels in KERNELS:
        tokens, logprobs, _ = sample(
            logits, torch.rand(8).double(), SamplingParams(temperature=0.0), kernels=kernels
        )
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.allclose(logprobs, torch.log_softmax(logits, -1).amax(-1), atol=1e-5)


def test_the_repetition_penalty_is_hugging_faces() -> None:
    logits, history = torch.randn(4, 60), (3, 9, 9, 41)
    u = torch.rand(4, dtype=torch.float64)
    tokens, logprobs, drawn = sample(logits, u, SamplingParams(repetition_penalty=1.7), history)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history] * 4), logits.clone())
    expected = torch.log_softmax(theirs, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(drawn, expected, atol=1e-5)
    untouched = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, untouched, atol=1e-5)


TOKENS = st.lists(st.integers(0, 11), max_size=30)
PENALTY = st.floats(-2, 2)


@given(TOKENS, TOKENS, PENALTY, PENALTY, st.sampled_from([0.0, 0.5, 1.0, 1.7]))
@settings(max_examples=100, deadline=None)
def test_frequency_and_presence_penalties_are_the_oracles(
    prompt: list[int], completion: list[int], frequency: float, presence: float, temperature: float
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(len(prompt)))
    params = SamplingParams(
        frequency_penalty=frequency, presence_penalty=presence, temperature=temperature
    )
    token, logprob, drawn = sample(
        logits,
        torch.tensor([0.4], dtype=torch.float64),
        params,
        tuple(prompt),
        completion=tuple(completion),
    )
    theirs = oracle.penalized(logits[0].tolist(), completion, frequency, presence)
    chosen, scale = int(token), temperature or 1.0
    if temperature == 0:
        assert theirs[chosen] == pytest.approx(max(theirs), abs=1e-5)
    expected = oracle.log_softmax([x / scale for x in theirs])[chosen]
    assert float(drawn) == pytest.approx(expected, abs=1e-4)
    untouched = oracle.log_softmax([x / scale for x in logits[0].tolist()])[chosen]
    assert float(logprob) == pytest.approx(untouched, abs=1e-4)


@given(
    st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.25, 3.0]), min_size=1, max_size=40),
    st.integers(0, 50),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None)
def test_the_most_likely_tokens_are_the_oracles_with_many_ties(
    logits: list[float], top: int, dtype: torch.dtype
) -> None:
    V = len(logits)
    rows = torch.tensor([logits, logits[::-1]], dtype=dtype)
    chosen = [V - 1, 0]
    scores = token_scores(rows, torch.tensor(chosen), top)
    for row, own, score in zip(rows, chosen, scores, strict=True):
        theirs = oracle.log_softmax(row.tolist())
        first = oracle.most_likely(row.tolist(), top)
        assert [token for token, _ in score.top] == first
        assert [x for _, x in score.top] == pytest.approx([theirs[t] for t in first], abs=1e-5)
        assert score.logprob == pytest.approx(theirs[own], abs=1e-5)
        assert dict(score.top).get(own, score.logprob) == score.logprob
        if score.top:
            assert score.top[0][0] == int(row.float().argmax())


def test_scores_do_not_depend_on_how_many_rows_are_computed_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, tokens = torch.randn(7, 90), torch.arange(7)
    together = token_scores(logits, tokens, 5)
    monkeypatch.setattr("gearshift.engine.sampler._LOGITS_AT_ONCE", 200)
    assert token_scores(logits, tokens, 5) == together


def test_bias_and_bad_words_shape_what_is_drawn() -> None:
    logits = torch.zeros(2000, 6)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def frequencies(history: tuple[int, ...] = (1,), **params: object) -> list[float]:
        tokens, _, _ = sample(logits, u, SamplingParams(**params), history)
        return (torch.bincount(tokens, minlength=6) / 2000).tolist()

    assert frequencies(logit_bias=((4, math.log(5)),))[4] == pytest.approx(0.5, abs=1e-3)
    assert frequencies(bad_words=((2,),))[2] == 0
    assert frequencies(bad_words=((1, 2),))[2] == 0
    assert frequencies(history=(2, 3), bad_words=((1, 2),))[2] > 0.1
    assert frequencies(history=(0, 1, 5), bad_words=((1, 5, 2),))[2] == 0


def test_rows_are_sampled_by_their_own_parameters() -> None:
    logits, u = torch.randn(3, 40), torch.rand(3, dtype=torch.float64)
    own = [SamplingParams(top_k=2), SamplingParams(temperature=0.0), SamplingParams(top_p=0.4)]
    together = sample_rows(KERNELS[0].sample, logits, u, own, [([], [])] * 3)
    for i, params in enumerate(own):
        alone = sample(logits[i : i + 1], u[i : i + 1], params)
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.allclose(ours[i], theirs[0])
