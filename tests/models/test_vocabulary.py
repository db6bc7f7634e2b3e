"""A model and a tokenizer with different tokens are refused when they are used together."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gearshift.batch import PackedBatch
from gearshift.engine import Engine, EngineConfig
from gearshift.errors import ConfigError, DataError, ModelError
from gearshift.models.classifier import use_own_pad
from gearshift.models.load import ModelConfig, load_classifier
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.models.vocabulary import check_vocabulary, vocabulary_size
from gearshift.pipeline.stages import load_reference, load_value_model
from gearshift.rollouts.vllm import GenerationConfig
from gearshift.trainers.rl.methods import CriticConfig
from gearshift.types import SamplingParams


def no_change(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pass


def added(_: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["<tool>"])


def added_pad(_: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": "<pad>"})


def fewer_rows(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> None:
    model.resize_token_embeddings(200)


def added_by_the_processor(_: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 900)]
    )


def head(rows: int) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], None]:
    def change(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> None:
        model.set_output_embeddings(nn.Linear(32, rows, bias=False))

    return change


def configured(where: str, name: str, value: Any) -> Any:
    def change(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> None:
        setattr(getattr(model, where), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (added, "token 259 .'<tool>'"), (added_pad, "<pad>"), (fewer_rows, "only 200"),
        (added_by_the_processor, "token 900"), (head(200), "only 200"), (head(300), "head of"),
        (configured("generation_config", "eos_token_id", 400), "eos_token_id .* is 400"),
        (configured("generation_config", "eos_token_id", [2, 259]), "is 259"),
        (configured("generation_config", "eos_token_id", -1), "is -1"),
        (configured("generation_config", "pad_token_id", 259), "pad_token_id"),
        (configured("config", "eos_token_id", 999), "eos_token_id"),
        (configured("config", "pad_token_id", 999), "pad_token_id"),
    ],
)  # fmt: skip
def test_what_would_be_an_index_error_is_told(change: Any, said: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    change(model, tokenizer)
    with pytest.raises(ModelError, match=said) as caught:
        Engine(model, tokenizer)
    assert "\n" not in str(caught.value)


def test_more_rows_than_tokens_are_fine_and_can_be_sampled() -> None:
    model, tokenizer = tiny_model(vocab_size=320), tiny_tokenizer()
    engine = Engine(model, tokenizer, EngineConfig(max_length=64))
    assert engine.vocabulary == 320
    params = SamplingParams(max_new_tokens=5, logit_bias={300: 1e4}, stop="nothing says this")
    with engine.generating():
        [[c]] = engine.generate([[5, 6]], params)
    assert c.token_ids == [300] * 5


def test_a_familys_default_end_token_says_nothing_of_a_small_vocabulary() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=259, n_embd=8, n_head=2))
    assert model.generation_config.eos_token_id == 50256
    assert check_vocabulary(model, tiny_tokenizer()) == 259


def test_nested_configs_and_media_tokens() -> None:
    text = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision)
    assert vocabulary_size(AutoModelForCausalLM.from_config(config)) == 259
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"  # as Gemma 3's text models have it
    engine = Engine(model, tokenizer)
    with engine.generating(), pytest.raises(DataError, match="259"):
        engine.generate([tokenizer.encode("<image>")])
    ids = torch.tensor(tokenizer.encode("a<image>"))
    mask = torch.ones(2, dtype=torch.bool)
    batch = PackedBatch(
        ids, torch.arange(2), torch.tensor([0, 2]), torch.tensor([-1]), mask & (ids > 258)
    )
    with engine.training(), pytest.raises(DataError, match="token 259"):
        engine.logprobs(batch)


def test_reward_models_are_checked_too() -> None:
    model, tokenizer = load_classifier(ModelConfig(name="tiny")), tiny_tokenizer()
    use_own_pad(model, tokenizer)
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(ModelError, match="<tool>"):
        use_own_pad(model, tokenizer)


def test_the_largest_id_counts_and_not_the_number_of_tokens() -> None:
    model, tokenizer = tiny_model(vocab_size=257), tiny_tokenizer()
    assert len(tokenizer) == 259
    with pytest.raises(ModelError, match="token 258"):
        Engine(model, tokenizer)
    assert isinstance(model.config, LlamaConfig)


@pytest.mark.parametrize("key", ["value.init_from", "kl.reference"])
def test_who_is_shown_the_policys_tokens_must_know_them(tmp_path: Path, key: str) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    recipe = SimpleNamespace(model=ModelConfig(), generation=GenerationConfig())
    run: Any = SimpleNamespace(
        recipe=recipe, folder=tmp_path, show_form=lambda role, runner: runner
    )

    def load() -> None:
        if key == "value.init_from":
            load_value_model(
                CriticConfig(kind="critic", init_from=str(tmp_path)), run, engine, None
            )
        else:
            load_reference(run, engine, None, str(tmp_path))

    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load()  # more rows, the same tokens
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=rf"rl\.{key}.*at another place"):
        load()
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_model(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="fewer tokens"):
        load()
