"""Invariant 6: after updates and gear shifts in any order the gears still agree, on one storage."""

import copy
from pathlib import Path

import pytest
import torch

from gearshift.engine import Engine
from gearshift.errors import GearshiftError, ModelError
from gearshift.models.load import ModelConfig, load_policy, save_model
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.types import SamplingParams
from tests.invariants.test_2_greedy_is_hugging_face import GREEDY, hugging_face
from tests.zoo import PROMPTS, pack_completions, random_model, sampled_logprobs


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_after_each_update_both_gears_are_the_new_policy(family: str) -> None:
    engine = Engine(random_model(family), tiny_tokenizer())
    optimizer = MasterAdamW(engine.model.parameters(), OptimizerConfig(lr=1e-2), total_steps=3)
    before = None
    for step in range(3):
        with engine.generating():
            groups = engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=10))
            greedy = [g[0].token_ids for g in engine.generate(PROMPTS, GREEDY)]
        assert {v for g in groups for c in g for v in c.weights_versions} == {step}
        batch = pack_completions(PROMPTS, groups)
        with engine.training(), engine.training():  # nests
            scores = engine.logprobs(batch)
            scores.logprobs.mean().backward()
            optimizer.step()
        engine.weights_changed()
        assert (scores.logprobs - sampled_logprobs(groups)).abs().max() <= 1e-5
        assert greedy != before  # the updates were large enough to be seen
        before = greedy
    theirs = random_model(family, attention="eager")
    theirs.load_state_dict({k: v.clone() for k, v in engine.model.state_dict().items()})
    with engine.generating():
        ours = [g[0].token_ids for g in engine.generate(PROMPTS, GREEDY)]
    assert ours == [hugging_face(theirs, prompt, 24, end=2) for prompt in PROMPTS]


def test_parameters_are_slices_of_the_fused_buffers() -> None:
    engine = Engine(random_model("qwen2"), tiny_tokenizer())
    attention = engine.model.base_model.layers[0].self_attn
    fused = engine.runner.weights.qkv[0]
    assert attention.q_proj.weight.data_ptr() == fused.weight.data_ptr()
    with torch.no_grad():
        attention.v_proj.weight.fill_(3.0)
        attention.k_proj.bias.fill_(4.0)
    rows = attention.v_proj.out_features
    assert (fused.weight[-rows:] == 3.0).all()
    assert (fused.bias[-2 * rows : -rows] == 4.0).all()


def test_broken_aliasing_is_restored_at_the_shift() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    projection = engine.model.base_model.layers[1].mlp.up_proj
    projection.weight.data = torch.randn_like(projection.weight)
    expected = copy.deepcopy(engine.model)
    expected.set_attn_implementation("eager")
    with engine.generating():
        ours = [g[0].token_ids for g in engine.generate(PROMPTS, GREEDY)]
    assert ours == [hugging_face(expected, prompt, 24, end=2) for prompt in PROMPTS]
    assert all(rows.is_aliased() for rows in engine.runner.weights)


def test_a_saved_model_is_the_model_that_was_trained(tmp_path: Path, device: torch.device) -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    save_model(tmp_path / "model", engine.model, engine.tokenizer, "card")
    loaded = load_policy(
        ModelConfig(name=str(tmp_path / "model"), dtype="float32", device=str(device))
    )
    for name, value in engine.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_model_whose_attention_was_swapped_is_refused() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    engine.model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="attention is 'sdpa'"), engine.generating():
        pass


def test_the_wrong_gear_is_refused() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    with pytest.raises(GearshiftError, match=r"with engine.generating\(\)"):
        engine.generate(PROMPTS)
    with engine.generating(), pytest.raises(GearshiftError, match="training gear"):
        engine.logprobs(None)
