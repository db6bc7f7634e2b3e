"""A recorded step is the step that was recorded, whatever happens to weights and cache; steps drawn
ahead are the same steps.
"""

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests import zoo
from tests.device import ON_CPU
from tests.models.families import random_model as small_model
from tests.models.families import small_config
from tests.zoo import CONFIGS, PROMPTS, Written, assert_same, random_model

PARAMS = SamplingParams(n=3, max_new_tokens=20)
MANY = tuple(range(60, 259))
# By a CPU's kernels; those of a GPU record every family.
RECORDED = {"llama", "mistral", "qwen2", "smollm3", "phi3"}


def engine(name: str = "llama", **config: object) -> Engine:
    """A GPU looks after each step, as a CPU does, and computes in fp32, where tokens are equal."""
    model = random_model(name).to(torch.bfloat16 if ON_CPU else torch.float32)
    keys = EngineConfig.model_validate({"decode_steps_per_sync": 1, **config})
    return Engine(model, tiny_tokenizer(), keys, seed=5)


def unrecorded(e: Engine) -> Engine:
    e.runner.kernels.capture = lambda prepare, run: None  # type: ignore[method-assign]
    return e


def written(e: Engine) -> Written:
    with e.generating():
        return zoo.written(e.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_writes_the_same(name: str) -> None:
    one, other = engine(name), unrecorded(engine(name))
    assert_same(written(one), written(other))
    if not ON_CPU:
        assert one.memory()["steps"] > 0
    elif one.runner.kernels.prepacked_linear(torch.zeros(16, 16).bfloat16(), 1) is not None:
        assert (one.memory()["steps"] > 0) == (name in RECORDED)
    assert other.memory()["steps"] == 0


@torch.no_grad()
def test_recorded_steps_follow_the_weights() -> None:
    one, other = engine(), unrecorded(engine())
    before = written(one)
    for e in (one, other):
        layer = e.model.model.layers[0]
        layer.mlp.down_proj.weight += 0.3  # in place, packed
        layer.input_layernorm.weight *= -1  # in place
        layer.post_attention_layernorm.weight.data = -layer.post_attention_layernorm.weight.data
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data * 2  # elsewhere
        e.weights_changed()
    after = written(one)
    assert_same(after, written(other))
    assert [tokens for [(tokens, *_), *_] in before] != [tokens for [(tokens, *_), *_] in after]


def test_recorded_steps_follow_a_cache_that_grows() -> None:
    one, other = engine(max_num_seqs=4), unrecorded(engine(max_num_seqs=4))
    for e in (one, other):
        with e.generating():
            e.generate(PROMPTS[:1], SamplingParams(n=2, max_new_tokens=2))
    assert_same(written(one), written(other))


@pytest.mark.parametrize("kv_cache_tokens", [None, 96])
def test_steps_drawn_ahead_are_the_same_steps(kv_cache_tokens: int | None) -> None:
    bounds = {"max_num_seqs": 5, "kv_cache_tokens": kv_cache_tokens}
    one, ahead = engine(**bounds), engine(decode_steps_per_sync=7, **bounds)
    params = [
        SamplingParams(n=2, max_new_tokens=23),
        SamplingParams(n=3, max_new_tokens=4, stop=("e",)),
        SamplingParams(n=1, max_new_tokens=30, temperature=0.0),
        SamplingParams(n=2, max_new_tokens=17, top_k=5),
        SamplingParams(n=2, max_new_tokens=17, min_new_tokens=9, stop_token_ids=MANY),
    ]
    groups = []
    for e in (one, ahead):
        with e.generating():
            groups.append(zoo.written(e.generate([*PROMPTS, [9, 8]], params)))
    assert_same(*groups)
    steps = [e.take_stats().decode_tokens for e in (one, ahead)]
    assert kv_cache_tokens is not None or steps[0] == steps[1]
    scheduler = ahead.loop._scheduler
    assert scheduler is not None
    assert scheduler.cache.available == scheduler.cache.blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "opt", "biogpt", "ctrl", "llama"])
def test_steps_drawn_ahead_of_the_last_position_are_thrown_away(
    name: str, dtype: torch.dtype
) -> None:
    """No table of positions is read beyond its end, and the other rows are as without."""
    written = []
    for ahead in (1, 8):
        model = random_model(name) if name in CONFIGS else small_model(small_config(name))
        one = Engine(model.to(dtype), tiny_tokenizer(), EngineConfig(decode_steps_per_sync=ahead))
        longest = one.max_length
        prompts = [[5] * (longest - 5), [6, 7]]
        params = [SamplingParams(max_new_tokens=n, n=2) for n in (5, 20)]
        with one.generating():
            written.append([c for group in one.generate(prompts, params) for c in group])
    for a, b in zip(*written, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_steps_drawn_ahead_do_not_stretch_a_dynamic_rotary() -> None:
    """Its frequencies follow the longest position of the batch, also of a row that has ended."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    written = []
    for ahead in (1, 8):
        model = small_model(small_config("llama", rope_parameters=rope))
        one = Engine(model, tiny_tokenizer(), EngineConfig(decode_steps_per_sync=ahead))
        params = [SamplingParams(max_new_tokens=n) for n in (3, 20)]
        with one.generating():
            written.append(one.generate([[5] * (one.max_length - 3), [6, 7]], params))
    for a, b in zip(*written, strict=True):
        assert a[0].token_ids == b[0].token_ids
        assert a[0].logprobs == pytest.approx(b[0].logprobs, abs=1e-4)
