"""The engine's limits, stop rules, memory; an architecture it would compute wrongly is refused."""

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import CapacityError, ConfigError, GearshiftError, ModelError
from gearshift.models.adapters import AdapterConfig, adapted_layers, adapters_off, add_adapter
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import ON_CPU
from tests.zoo import PROMPTS, pack_completions, random_model, sampled_logprobs


@pytest.fixture
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer(), EngineConfig(max_length=64))


def test_a_prompt_that_does_not_fit_is_refused(engine: Engine) -> None:
    with engine.generating():
        with pytest.raises(CapacityError, match=r"Prompt 1 has 60 tokens.*limit of 64"):
            engine.generate([[3], [4] * 60], SamplingParams(max_new_tokens=5))
        with pytest.raises(CapacityError, match="Prompt 0 is empty"):
            engine.generate([[]])
        [[c]] = engine.generate([[4] * 59], SamplingParams(max_new_tokens=5))
        assert len(c.token_ids) <= 5


def test_finish_reasons(engine: Engine) -> None:
    with engine.generating():
        groups = engine.generate(PROMPTS, SamplingParams(n=16, max_new_tokens=40))
    completions = [c for group in groups for c in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        ended = c.token_ids[-1] in engine.end_tokens
        assert (c.finish_reason == "stop") == ended
        assert ended or len(c.token_ids) == 40
        assert not engine.end_tokens & set(c.token_ids[:-1])
        assert len(c.logprobs) == len(c.token_ids)


def test_stop_strings_end_a_completion(engine: Engine) -> None:
    params = SamplingParams(n=8, max_new_tokens=30, temperature=1.0)
    with engine.generating():
        [free] = engine.generate(PROMPTS[:1], params)
        text = engine.tokenizer.decode(free[0].token_ids)
        stop = text[len(text) // 2]
        [held] = engine.generate(PROMPTS[:1], SamplingParams(n=8, max_new_tokens=30, stop=(stop,)))
    for a, b in zip(free, held, strict=True):
        assert a.token_ids[: len(b.token_ids)] == b.token_ids
        words = engine.tokenizer.decode(b.token_ids)
        assert stop not in engine.tokenizer.decode(b.token_ids[:-1])
        assert (stop in words) or a.token_ids == b.token_ids
    assert held[0].finish_reason == "stop"


def test_a_stop_token_ends_a_completion(engine: Engine) -> None:
    with engine.generating():
        [[free]] = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=20))
        token = free.token_ids[3]
        first = free.token_ids.index(token)
        params = SamplingParams(max_new_tokens=20, stop_token_ids=(token,))
        [[held]] = engine.generate(PROMPTS[:1], params)
    assert held.token_ids == free.token_ids[: first + 1] and held.finish_reason == "stop"


def test_no_prompts_no_completions(engine: Engine) -> None:
    with engine.generating():
        assert engine.generate([]) == []


def test_memory_is_reported_and_given_back() -> None:
    config = EngineConfig(free_cache_while_training=True)
    engine = Engine(random_model("llama"), tiny_tokenizer(), config)
    weights = sum(p.nbytes for p in engine.model.parameters())
    assert engine.memory()["weights"] == weights > engine.memory()["aliased"] > 0
    with engine.generating():
        engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=3))
    # 8 rows x 2 blocks, and nobody's, of 16 positions x 2 layers x (k, v) x 2 heads x 8 x 4 bytes
    needed = (8 * 2 + 1) * 16 * 2 * 2 * 2 * 8 * 4
    cache = engine.memory()["cache"]
    assert cache == needed if ON_CPU else cache >= needed  # a GPU's has its size from the start
    with engine.training():
        assert engine.memory()["cache"] == 0


def test_a_model_in_another_precision_still_generates() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    params = SamplingParams(n=2, max_new_tokens=6)
    with engine.generating():
        engine.generate(PROMPTS, params)
    engine.model.to(torch.bfloat16)
    with engine.generating():
        groups = engine.generate(PROMPTS, params)
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(pack_completions(PROMPTS, groups)).logprobs
    assert (scored - sampled_logprobs(groups)).abs().mean() <= 0.05


def test_a_head_that_does_something_else_is_refused() -> None:
    model = random_model("llama")
    forward = model.forward

    def other(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = other
    with pytest.raises(ModelError, match="its head on its hidden states"):
        Engine(model, tiny_tokenizer())


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.0}, {"max_new_tokens": 0}],
)
def test_sampling_parameters_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_head_bias_and_untied_head_are_used() -> None:
    """GPT-NeoX's head is its own matrix; greedy parity covers it elsewhere, its gradient here."""
    engine = Engine(random_model("gpt_neox"), tiny_tokenizer())
    with engine.generating():
        groups = engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
    with engine.training():
        engine.logprobs(pack_completions(PROMPTS, groups)).logprobs.sum().backward()
    head = engine.model.get_output_embeddings().weight
    assert head.grad is not None and torch.isfinite(head.grad).all() and head.grad.abs().sum() > 0


def changed_by(how: str, engine: Engine) -> None:
    """Change what the model computes."""
    model = engine.model
    layers = [layer for _, layer in adapted_layers(model)]
    if how == "switched off":
        for layer in layers:
            layer.enable_adapters(False)
    elif how == "merged":
        for layer in layers:
            layer.merge()
            layer.base_layer.weight.data += 0.1  # which only `merged` shows
    elif how == "scaled":
        for layer in layers:
            layer.set_scale("default", 3.0)
    elif how == "loaded":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    elif how == "written":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(2)
    elif how == "replaced":
        weight = model.model.layers[1].self_attn.k_proj.base_layer.weight
        weight.data = weight.data * 2
    elif how == "another precision":
        model.to(torch.bfloat16 if model.dtype == torch.float32 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "how",
    ["switched off", "merged", "scaled", "loaded", "written", "replaced", "another precision"],
)
def test_a_cache_of_other_weights_cannot_be_reached(how: str, dtype: torch.dtype) -> None:
    """Within one generation gear, without a word to the engine."""

    def fresh() -> Engine:
        model = random_model("llama")
        torch.manual_seed(1)
        add_adapter(model, AdapterConfig(rank=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
        return Engine(model.to(dtype), tiny_tokenizer())

    params, prompts = SamplingParams(max_new_tokens=8), [[20 + i for i in range(50)]]
    one, other = fresh(), fresh()
    with one.generating():
        before = one.generate(prompts, params)
        changed_by(how, one)
        after = one.generate(prompts, params)
    changed_by(how, other)
    with other.generating():
        expected = other.generate(prompts, params)
    assert after[0][0].logprobs == pytest.approx(expected[0][0].logprobs, abs=1e-4)
    assert before[0][0].logprobs != after[0][0].logprobs
    assert one.weights_version > 0 or how == "another precision"


def test_weights_that_change_under_a_running_request_end_it() -> None:
    one = Engine(random_model("llama"), tiny_tokenizer())
    with one.generating():
        running = one.stream(PROMPTS[0], SamplingParams(max_new_tokens=30))
        next(running)
        one.model.load_state_dict(one.model.state_dict())
        with pytest.raises(GearshiftError, match="weights changed while requests were running"):
            one.loop.step()
        assert len(one.generate(PROMPTS, SamplingParams(max_new_tokens=2))) == len(PROMPTS)


def test_adapters_that_were_off_stay_off() -> None:
    model = random_model("llama")
    add_adapter(model, AdapterConfig(rank=4))
    with adapters_off(model):
        with adapters_off(model):
            pass
        assert all(layer.disable_adapters for _, layer in adapted_layers(model))
    assert not any(layer.disable_adapters for _, layer in adapted_layers(model))
