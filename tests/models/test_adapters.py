"""LoRA in both gears: one policy, a reference without a copy, saved so that others load it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gearshift.engine import Engine
from gearshift.errors import ModelError
from gearshift.models import adapter_merge
from gearshift.models.adapters import AdapterConfig, adapters_off, add_adapter
from gearshift.models.load import (
    ModelConfig,
    load_classifier,
    load_config,
    load_policy,
    load_tokenizer,
    save_model,
)
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, hf_scores, pack_completions, random_model, sampled_logprobs

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3", "phi3", "opt"]
CPU = ModelConfig(dtype="float32", device="cpu")
PARAMS = SamplingParams(n=2, max_new_tokens=12)


def adapted(family: str, seed: int = 0) -> Engine:
    """An engine whose adapters already do something."""
    model = random_model(family)
    add_adapter(model, AdapterConfig(rank=4, alpha=8))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return Engine(model, tiny_tokenizer())


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
    engine, plain = adapted(family), Engine(random_model(family), tiny_tokenizer())
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
    loaded = Engine(
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
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(ModelError, match=r"model.lora.targets names the embedding or the head"):
            add_adapter(random_model("llama"), AdapterConfig(targets=("q_proj", target)))


def test_adapters_that_others_made(tmp_path: Path) -> None:
    """Adapters of four kinds are read: of a reward model, whose score head is trained as a whole;
    with added tokens; without a tokenizer; and with a base that is a relative folder, or itself an
    adapter.
    """
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    save_model(base, random_model("llama"), tiny_tokenizer(), "card")
    engine = adapted("llama")
    save_model(first, engine.model, engine.tokenizer, "card", AdapterConfig(save="adapter"), "base")
    (first / "adapter_config.json").write_text(
        (first / "adapter_config.json").read_text().replace('"base"', '"../base"')
    )
    policy = load_policy(CPU, str(first))
    model = load_classifier(CPU, str(first), fresh_head=True)
    model.resize_token_embeddings(262, mean_resizing=False)
    peft_model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"])
    )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    peft_model.peft_config["default"].base_model_name_or_path = str(first)
    peft_model.save_pretrained(second, save_embedding_layers=True)
    ids = [[5, 6, 7], [8, 261]]
    wanted = hf_scores(peft_model.base_model.model, ids)
    assert hf_scores(load_classifier(CPU, str(second)), ids) == pytest.approx(wanted, abs=1e-5)
    assert load_tokenizer(CPU, str(second)).chat_template == tiny_tokenizer().chat_template
    for of_tokens in (False, True):
        trunk = load_classifier(CPU, str(first), of_tokens, fresh_head=True).base_model.state_dict()
        for name, tensor in policy.base_model.state_dict().items():
            assert torch.equal(tensor, trunk[name]), name
    with pytest.raises(ModelError, match="makes a reward model, which writes no text"):
        load_policy(CPU, str(second))


@pytest.mark.parametrize(
    "what",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"},
    ],
    ids=str,
)
def test_what_an_adapter_changes_besides(what: dict[str, Any], tmp_path: Path) -> None:
    """A head that is trained alone is the embedding no more."""
    model = random_model("llama", "eager")
    save_model(tmp_path / "base", model, tiny_tokenizer(), "card")
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **what))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    wanted = peft_model.eval()(ids).logits
    loaded = load_policy(CPU, str(tmp_path / "adapter"))
    save_model(tmp_path / "whole", loaded, tiny_tokenizer(), "card")
    for again in (loaded, load_policy(CPU, str(tmp_path / "whole"))):
        again.set_attn_implementation("eager")
        assert torch.allclose(again(ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [310, 290])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], None], ids=str)
def test_an_adapter_of_a_vocabulary_that_was_resized(
    rows: int, saved: list[str] | None, tmp_path: Path
) -> None:
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
    trained = get_peft_model(model, config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    loaded = load_policy(CPU, str(tmp_path / "adapter"))
    loaded.set_attn_implementation("eager")
    assert torch.allclose(loaded(ids).logits, trained.eval()(ids).logits, atol=1e-4)


def test_an_adapter_of_a_kind_without_a_rank(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    load_policy(CPU, str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it was trained on"),
        ({"base_model_name_or_path": "/nowhere"}, "was trained on /nowhere"),
        ({"base_model_name_or_path": "../saved"}, "names itself"),
        ({"target_modules": ["query"]}, "does not fit"),
        ({"r": 3}, "does not fit"),
        ({"r": 0}, "does not fit .*positive"),
        ({"r": -1}, "has r: -1"),
        ({"r": 10**12}, "has r: 1000000000000"),
        ({"rank_pattern": {"q_proj": 10**12}}, "has r: 1000000000000"),
        ({"lora_alpha": float("nan")}, "has lora_alpha: nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "has lora_alpha: inf"),
        ({"base_model_name_or_path": "a" * 9999}, "was trained on aaa"),
        ({"target_modules": "("}, "does not fit"),
        ({"target_modules": "(([a-z._0-9])+)+!"}, "a pattern that takes too long"),
        ({"rank_pattern": {"(([a-z._0-9])+)+!": 2}}, "a pattern that takes too long"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "has megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "has layer_replication"),
        ({"use_dora": True}, "does not fit .*lora_magnitude_vector"),
        ({"peft_type": "IA3"}, "does not fit .*ia3_l"),
        ({"peft_type": "NOWHERE"}, "does not fit"),
        ({"target_modules": ["0.mlp.up_proj"]}, "does not fit"),
        ({"modules_to_save": ["lm_head"]}, "does not fit"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, "changes no weights"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_merge, "_SECONDS", 2)
    base, saved = tmp_path / "base", tmp_path / "saved"
    save_model(base, random_model("llama"), tiny_tokenizer(), "card")
    engine = adapted("llama")
    lora = AdapterConfig(save="adapter")
    save_model(saved, engine.model, engine.tokenizer, "card", lora, str(base))
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(CPU, str(saved))
    assert "\n" not in str(caught.value)


def test_every_weight_of_an_adapter_is_its_files(tmp_path: Path) -> None:
    base, whole = tmp_path / "base", tmp_path / "whole"
    save_model(base, random_model("llama"), tiny_tokenizer(), "card")
    engine = adapted("llama")
    save_model(
        whole, engine.model, engine.tokenizer, "card", AdapterConfig(save="adapter"), str(base)
    )
    state = load_file(whole / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    deeper = name.replace("layers.0", "layers.7")
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in state.items() if k != name}, r"layers.0.self_attn.q_proj.lora_A"),
        ({**state, deeper: state[name].clone()}, "layers.7.self_attn.q_proj.lora_A"),
        ({**state, "extra": torch.ones(2)}, "it leaves extra"),
        ({**state, name: state[name].T.contiguous()}, "size mismatch for .*q_proj.lora_A"),
        ({**state, name: state[name] * torch.nan}, "not finite.*q_proj.weight"),
        ({**state, name: state[name].to(torch.int8)}, "quantised weights .I8"),
        ({}, "has r: "),
    ]
    for i, (changed, message) in enumerate(changes):
        folder = Path(shutil.copytree(whole, tmp_path / str(i)))
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_policy(CPU, str(folder))
    os.truncate(folder / "adapter_model.safetensors", 20)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is no whole safetensors file"):
        load_policy(CPU, str(folder))
    with pytest.raises(ModelError, match=r"score.weight would be random"):
        load_classifier(CPU, str(whole))


def test_adapters_that_stand_on_each_other_in_a_circle(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "adapter_model.safetensors").touch()
        settings = {"base_model_name_or_path": str(tmp_path / other)}
        (tmp_path / one / "adapter_config.json").write_text(json.dumps(settings))
    for load in (load_policy, load_classifier, load_tokenizer, load_config):
        with pytest.raises(ModelError, match="stands on 2 others, or on itself"):
            load(CPU, str(tmp_path / "a"))


def test_a_run_that_was_moved_finds_its_own_stages_alone(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The adapter of `sft` was trained on another run's `rl`, that of `rl` on `sft`."""
    other, run, moved = tmp_path / "other" / "rl", tmp_path / "run", tmp_path / "moved"
    engine, lora = adapted("llama"), AdapterConfig(save="adapter")
    save_model(other, random_model("llama"), tiny_tokenizer(), "card")
    for stage, base in (("sft", other), ("rl", run / "sft")):
        save_model(run / stage, engine.model, engine.tokenizer, "card", lora, str(base))
    assert not recwarn.list  # the hub is asked nothing about the base
    (run / "recipe.yaml").write_text(f"run: {{dir: {run}}}")
    whole = load_policy(CPU, str(run / "rl")).state_dict()
    run.rename(moved)
    again = load_policy(CPU, str(moved / "rl")).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    other.rename(tmp_path / "away")
    with pytest.raises(ModelError, match=f"in {moved / 'sft'} was trained on {other}"):
        load_policy(CPU, str(moved / "rl"))


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_text("")
    with pytest.raises(ModelError, match="save it as safetensors"):
        load_policy(CPU, str(tmp_path))
