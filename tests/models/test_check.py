"""A model that would be computed wrongly is refused with the reason; the check leaves no trace."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from gearshift.batch import pack_groups
from gearshift.engine import Engine, EngineConfig
from gearshift.errors import CapacityError, ModelError
from gearshift.kernels.specs import AttentionOptions
from gearshift.models import describe
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.attention import ATTENTION
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.models.families import alone, far, random_model, small_config
from tests.zoo import CONFIGS
from tests.zoo import random_model as zoo_model

STATES = ["qwen3_next", "lfm2", "falcon_h1", "mamba2", "zaya"]


def made(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    model = random_model(small_config(kind, **options)).to(dtype)
    model.set_attn_implementation(ATTENTION)
    return model


def engine(model: PreTrainedModel, **config: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), EngineConfig(**config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_described_family_passes(family: str, dtype: torch.dtype) -> None:
    assert engine(zoo_model(family).to(dtype)).runner.form == "described"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STATES)
def test_a_state_beside_keys_and_values_is_refused(kind: str, dtype: torch.dtype) -> None:
    """Also where weights are so small that in bf16 no leak would show."""
    model = made(kind, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(0.1)
    with pytest.raises(ModelError, match=f"{kind}.*state beside keys and values"):
        engine(model)
    with pytest.raises(ModelError, match=f"{kind}.*state beside keys and values"):
        ModelRunner(model)


def misread(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    """From now on something of each layer is read wrongly."""
    read = describe._read

    def wrongly(*given: Any) -> describe.Plan:
        plan = read(*given)
        layers = tuple(dataclasses.replace(layer, **wrong) for layer in plan.layers)
        return dataclasses.replace(plan, layers=layers)

    monkeypatch.setattr(describe, "_read", wrongly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong",
    [
        {"rotary": None},
        {"attention": AttentionOptions(0.7)},
        {"attention": AttentionOptions(16**-0.5, window=3)},
        {"act": "gelu_tanh"},
    ],
)
def test_a_plan_that_is_wrong_is_refused(
    wrong: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    misread(monkeypatch, wrong)
    model = made("llama", dtype)
    with pytest.raises(ModelError, match="packed sequences differ"):
        engine(model)
    with pytest.raises(ModelError, match="packed sequences differ"):
        ModelRunner(model)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "does not go through Hugging Face's attention interface"),
        ("bart", "counts positions itself"),
        ("xlm-roberta", "positions do not count from 0"),
        ("bert", "its head on its hidden states"),
        ("diffllama", "attends more than once in a layer"),
        ("gpt_oss", "sinks"),
        ("doge", "makes attention masks"),
        ("stablelm", "drops keyword arguments"),
        ("deepseek_v32", "indexer"),
    ],
)
def test_a_refusal_names_family_and_reason(kind: str, reason: str) -> None:
    model = random_model(small_config(kind))
    with pytest.raises(ModelError, match=f"model type '{kind}'.*{reason}") as refused:
        engine(model)
    assert "\n" not in str(refused.value)


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("olmo")
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ModelError, match="attention interface"):
        engine(model)


def test_the_check_leaves_nothing_behind() -> None:
    model = made("mixtral")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    ModelRunner(model)
    assert torch.equal(torch.rand(3), drawn)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == ATTENTION
    e = engine(zoo_model("llama").to(torch.bfloat16))
    held = e.memory()
    assert held["cache"] == held["steps"] == held["prepacked"] == held["gradients"] == 0
    assert (e.weights_version, e.gear, e.take_stats().prefill_tokens) == (0, None, 0)
    with e.generating():
        assert e.weights_version == 0


def test_adapters_are_part_of_what_is_compared() -> None:
    for family in ("llama", "gpt2"):
        model = zoo_model(family)
        add_adapter(model, AdapterConfig(rank=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        engine(model)


def test_a_classifier_is_compared_by_its_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config)
    ModelRunner(model)
    misread(monkeypatch, {"rotary": None})
    with pytest.raises(ModelError, match="packed sequences differ"):
        ModelRunner(model)


LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 8,
        "short_factor": [1.0] * 8, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
LIMITED = [
    ("phi3", LONGROPE, 32, "longrope"),
    ("phimoe", {"sliding_window": 8}, 8, "sliding_window of 8"),
    ("phimoe", {"sliding_window": 40}, 40, "sliding_window of 40"),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}, 8, "sliding_window"),
    ("llama4_text", {"attention_chunk_size": 20}, 20, "attention_chunk_size of 20"),
]


@pytest.mark.parametrize(("kind", "options", "limit", "why"), LIMITED)
def test_what_is_right_up_to_a_length_runs_up_to_it(
    kind: str, options: dict[str, Any], limit: int, why: str
) -> None:
    model = made(kind, **options)
    with pytest.raises(ModelError, match=f"up to {limit} tokens only.*{why}.*max_length={limit}"):
        engine(model)
    with pytest.raises(ModelError, match=why):
        engine(model, max_length=limit + 1)
    e = engine(model, max_length=limit)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    prompts = [[7, 11], [5 + i for i in range(limit - 4)]]
    params = SamplingParams(max_new_tokens=4, temperature=1.0)
    with e.generating(), torch.no_grad():
        written = [group[0] for group in e.generate(prompts, params)]
        for prompt, c in zip(prompts, written, strict=True):
            assert far(torch.tensor(c.logprobs), alone(plain, prompt, c.token_ids)) < 1e-3
    long = pack_groups([([5] * limit, [([6], [1])])])
    with e.training(), pytest.raises(CapacityError, match=why):
        e.logprobs(long)
    with pytest.raises(CapacityError, match=why):
        ModelRunner(model).hidden(long)


def test_a_longer_limit_needs_no_setting() -> None:
    engine(made("phimoe", sliding_window=128))
    engine(made("phi3", sliding_window=8))  # passed on
    engine(made("qwen2_moe", sliding_window=8, use_sliding_window=False))


def test_a_text_config_inside_is_read() -> None:
    e = engine(made("gemma3"))
    assert e.max_length == 128
    capped = made("gemma4", text_config={"final_logit_softcapping": 3.0})
    assert engine(capped).head.softcap == 3.0
