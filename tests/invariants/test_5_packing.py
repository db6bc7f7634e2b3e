"""Invariant 5: packed = padded = prompt-shared, and one micro-batch = many: the loss and every
gradient.
"""

import pytest
import torch
from torch import Tensor

from gearshift.batch import PackedBatch
from gearshift.engine import Engine, EngineConfig
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.oracles.scores import lone_logprobs
from tests.zoo import FAMILIES, PROMPTS, pack_completions, random_model

Groups = list[tuple[list[int], list[list[int]]]]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def gradients(engine: Engine, batches: list[PackedBatch]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of sum_i w_i log p_i with weights that differ from token to token."""
    engine.model.zero_grad()
    total = 0.0
    for batch in batches:
        with engine.training():
            loss = (batch.scored("loss_weights") * engine.logprobs(batch).logprobs).sum()
            loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]


def assert_same(a: tuple[float, list[Tensor]], b: tuple[float, list[Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    whole = torch.cat([g.flatten() for g in b[1]]).norm()
    for ours, theirs in zip(a[1], b[1], strict=True):
        # Some are zero but for rounding (a key's bias): those relative to the whole gradient.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * whole


def test_shared_equals_packed_equals_one_at_a_time(family: str, device: torch.device) -> None:
    engine = Engine(random_model(family), tiny_tokenizer())
    with engine.generating():
        groups = engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12))
    shared = pack_completions(PROMPTS, groups, share=True)
    repeated = pack_completions(PROMPTS, groups, share=False)
    assert len(shared) < len(repeated)
    weights = torch.rand(int(shared.loss_mask.sum())).to(device)
    of_shared = gradients(engine, [shared.with_scored(loss_weights=weights)])
    of_repeated = gradients(engine, [repeated.with_scored(loss_weights=weights)])
    assert_same(of_shared, of_repeated)
    many = list(shared.with_scored(loss_weights=weights).split(micro_batch_tokens=20))
    assert len(many) == len(PROMPTS)
    assert_same(gradients(engine, many), of_shared)

    alone = random_model(family, attention="eager")
    i, loss = 0, torch.zeros((), device=device)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            logprobs, _ = lone_logprobs(alone, prompt, c.token_ids)
            loss = loss + (weights[i : i + len(logprobs)] * logprobs).sum()
            i += len(logprobs)
    loss.backward()
    grads = [p.grad for p in alone.parameters() if p.grad is not None]
    assert_same(of_shared, (loss.item(), grads))


def test_layers_computed_again_give_the_same_gradients(family: str, device: torch.device) -> None:
    results = []
    for recompute in (False, True):
        config = EngineConfig(recompute=recompute)
        engine = Engine(random_model(family), tiny_tokenizer(), config)
        with engine.generating():
            groups = engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=6))
        batch = pack_completions(PROMPTS, groups)
        weights = torch.linspace(-1, 1, int(batch.loss_mask.sum()), device=device)
        results.append(gradients(engine, [batch.with_scored(loss_weights=weights)]))
    assert_same(*results)
