"""The operations of training, against those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gearshift.batch import PackedBatch, pack
from gearshift.models.attention import eager_attention
from gearshift.models.describe import described
from gearshift.models.load import ModelConfig, load_policy
from gearshift.models.runner import ModelRunner
from gearshift.models.work import TrainingWork
from tests.zoo import random_model


def batch_of(length: int) -> PackedBatch:
    return pack([(list(range(5, 5 + length)), [0] + [1] * (length - 1))])


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_hugging_faces_forward_and_backward(frozen: bool) -> None:
    model, T = load_policy(ModelConfig(name="tiny", dtype="float32", device="cpu")), 96
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "mlp" not in name)
    plan, _ = described(model)
    assert plan is not None
    batch = batch_of(T)
    with eager_attention(model), FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=batch.input_ids[None]).last_hidden_state[0]
        model.get_output_embeddings()(hidden[:-1]).sum().backward()
    work = TrainingWork(model, plan)
    work.add(batch)
    work.add_head(batch)
    tokens, operations = work.take()
    # Eager attention computes the scores that a mask hides, too.
    hidden_scores = T * T - T * (T + 1) // 2
    shown = counter.get_total_flops() - 12 * len(plan.layers) * plan.heads * plan.head_size * (
        hidden_scores
    )
    assert tokens == T
    assert operations == pytest.approx(shown, rel=0.01)
    assert work.take() == (0, 0.0)


def test_a_window_bounds_what_a_token_sees() -> None:
    whole, cut = (ModelRunner(random_model(family)) for family in ("llama", "mistral"))
    for runner in (whole, cut):
        runner.hidden(batch_of(64))
    plan = whole.plan
    assert plan is not None
    hidden = sum(max(0, position + 1 - 8) for position in range(64))
    attention = 12 * len(plan.layers) * plan.heads * plan.head_size * hidden
    assert whole.work.take()[1] - cut.work.take()[1] == attention


def test_only_forwards_with_gradients_count() -> None:
    runner = ModelRunner(random_model("llama"))
    with torch.no_grad():
        runner.logprobs(batch_of(10))
    assert runner.work.take() == (0, 0.0)
    runner.logprobs(batch_of(10))
    assert runner.work.take()[0] == 10
