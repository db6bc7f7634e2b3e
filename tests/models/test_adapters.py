"""LoRA in both gears: one policy, a reference without a copy, saved so that others load it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.engine import HybridEngine
from gearshift.errors import ModelError
from gearshift.models.adapters import AdapterConfig, adapters_off, add_adapter
from gearshift.models.load import ModelConfig, load_policy, save_model
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, pack_completions, random_model, sampled_logprobs

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3", "phi3", "opt"]
PARAMS = SamplingParams(n=2, max_new_tokens=12)


def adapted(family: str, seed: int = 0) -> HybridEngine:
    """An engine whose adapters already do something."""
    model = random_model(family)
    add_adapter(model, AdapterConfig(rank=4, alpha=8))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return HybridEngine(model, tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_invariant_1_and_6_with_adapters(family: str) -> None:
    """The gears agree before and after updates; only adapters move."""
    engine = adapted(family)
    base = {n: p.clone() for n, p in engine.model.named_parameters() if "lora_" not in n}
    optimizer = MasterAdamW(engine.model.parameters(), OptimizerConfig(lr=1e-2), 3)
    for _ in range(3):
        with engine.generating():
            groups = engine.generate(PROMPTS, PARAMS)
        batch = pack_completions(PROMPTS, groups)
        with engine.training():
            scored = engine.logprobs(batch).logprobs
            assert (scored - sampled_logprobs(groups)).abs().max() <= 1e-5
            scored.mean().backward()
            optimizer.step()
        engine.weights_changed()
    for name, parameter in engine.model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, base[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_with_adapters_off_it_is_the_model_before(family: str) -> None:
    engine, plain = adapted(family), HybridEngine(random_model(family), tiny_tokenizer())
    with plain.generating():
        groups = plain.generate(PROMPTS, PARAMS)
    batch = pack_completions(PROMPTS, groups)
    with adapters_off(engine.model), engine.training(), torch.no_grad():
        reference = engine.logprobs(batch).logprobs
    assert (reference - sampled_logprobs(groups)).abs().max() <= 1e-5
    with engine.training(), torch.no_grad():
        assert (engine.logprobs(batch).logprobs - reference).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["merged", "adapter"])
def test_a_saved_adapter_is_what_was_trained(family: str, how: str, tmp_path: Path) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    save_model(base, random_model(family), tiny_tokenizer(), "card")
    engine = adapted(family)
    lora = AdapterConfig(save=how)
    save_model(saved, engine.model, engine.tokenizer, "card", lora, str(base))
    adapter = saved if how == "adapter" else saved / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()
    assert (saved / "model.safetensors").exists() == (how == "merged")
    ids = torch.tensor([PROMPTS[0]])
    with engine.generating():
        ours = [c.token_ids for g in engine.generate(PROMPTS, PARAMS) for c in g]
    loaded = HybridEngine(
        load_policy(ModelConfig(dtype="float32"), str(saved)), engine.tokenizer
    )  # fmt: skip
    assert not [n for n, _ in loaded.model.named_parameters() if "lora_" in n]
    with loaded.generating():
        assert ours == [c.token_ids for g in loaded.generate(PROMPTS, PARAMS) for c in g]
    theirs = AutoModelForCausalLM.from_pretrained(adapter, attn_implementation="eager")
    loaded.model.set_attn_implementation("eager")
    gap = (theirs(ids).logits - loaded.model(ids).logits).abs().max()
    assert gap <= 1e-4


def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"model.lora.targets.*nowhere"):
        add_adapter(random_model("llama"), AdapterConfig(targets=("nowhere",)))
