"""The perplexity of held-out answers counts what the policy sampled, and nothing else."""

import math

import pytest
import torch

from gearshift.engine import Engine
from gearshift.errors import DataError
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.pipeline.heldout import perplexity
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.rollouts.evaluate import evaluate
from tests.gyms import SayLetters


@pytest.mark.parametrize("longest", [3, 40])
def test_only_sampled_tokens_count(longest: int) -> None:
    """Under the slow obvious way: one episode at a time through the plain model."""
    engine = Engine(tiny_model(), tiny_tokenizer())
    collector = Collector(SayLetters, engine.tokenizer, engine.loop)
    starts = [EpisodeSpec(i, seed=i) for i in range(4)]
    with engine.generating():
        samples = evaluate(collector, starts, longest, metric="reward").samples
    total, count = 0.0, 0
    for sample in samples:
        ids, mask = sample["token_ids"], sample["loss_mask"]
        logprobs = tiny_model()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        found = [float(logprobs[i - 1, ids[i]].detach()) for i in range(len(ids)) if mask[i]]
        total, count = total - sum(found), count + len(found)
    if longest == 3:
        assert count == 12 and all(s["token_ids"][-1] not in engine.end_tokens for s in samples)
    assert perplexity(engine, samples) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_record_without_tokens_is_told() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    with pytest.raises(DataError, match="delete it"):
        perplexity(engine, [{"messages": []}])
