"""Critics: from a reward model, and from an encoder, which may not see what the policy wrote."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from gearshift.cli.main import main
from gearshift.data import Mixture
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.load import load_classifier, load_tokenizer, save_model
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.reward_model import (
    Pair,
    RewardModelConfig,
    pair_accuracy,
    train_reward_model,
)
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.trainers.rl.critic import PromptCritic, TokenCritic, load_critic
from gearshift.trainers.stage import Stage
from tests.trainers.rl_runs import TINY, small, trainer
from tests.trainers.test_guards import episodes
from tests.zoo import random_model


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A small random BERT with a score, saved."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path / "bert"
    save_model(folder, BertForSequenceClassification(config), tiny_tokenizer(), "a card")
    return str(folder)


def test_a_reward_models_score_is_the_first_value(tmp_path: Path) -> None:
    model = load_classifier(TINY)
    model.config.pad_token_id = 0  # not the end token, which the prompt has in it
    save_model(tmp_path / "rm", model, tiny_tokenizer(), "a card")
    critic = load_critic(TINY, str(tmp_path / "rm"), str)
    assert isinstance(critic, TokenCritic)
    saved = load_file(tmp_path / "rm" / "model.safetensors")
    assert torch.equal(critic.head.linear.weight, saved["score.weight"])
    # V after the whole sequence is the score: read it where a further token would be predicted.
    batch = pack_trajectories(episodes([False], [1.0]))
    ids = batch.input_ids
    with torch.no_grad():
        scores = [float(model(ids[None, :n]).logits) for n in (3, 4, 5, 6)]
        values = critic(batch)
    assert values.tolist() == pytest.approx(scores, abs=1e-5)


def test_an_encoder_values_the_prompt_and_nothing_else(encoder: str) -> None:
    critic = load_critic(TINY, encoder, tiny_tokenizer().decode)
    assert isinstance(critic, PromptCritic)
    group = episodes([False, False], [1.0, 0.0])
    other = [replace(t, token_ids=[*t.token_ids[:3], 60, 61, 62, 63]) for t in group]
    with torch.no_grad():
        values = critic(pack_trajectories(group))
        again = critic(pack_trajectories(other))
        asked = [replace(t, token_ids=[1, 21, *t.token_ids[2:]]) for t in group]
        elsewhere = critic(pack_trajectories(asked))
    assert values.shape == (8,) and len(set(values.tolist())) == 1
    assert torch.equal(values, again) and not torch.allclose(values, elsewhere)


def test_an_encoder_critic_learns(encoder: str, tmp_path: Path) -> None:
    config = small(
        steps=25,
        rollout={"prompts": 4},
        value={"kind": "critic", "optimizer": {"lr": 3e-3}},
        advantage={"name": "value_baseline"},
        kl={"beta": 0.0},
    )
    critic = load_critic(TINY, encoder, tiny_tokenizer().decode)
    trainer(config, tmp_path / "run", critic=critic).train()
    errors = [m["value/loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])


def test_an_encoder_reward_model_learns(encoder: str, tmp_path: Path) -> None:
    model = load_classifier(TINY, encoder)
    tokenizer = load_tokenizer(TINY, encoder)
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = [
        Pair(tokenizer.encode(f"{i} GOOD"), tokenizer.encode(f"{i} bad"), 0.5) for i in range(40)
    ]
    config = RewardModelConfig.model_validate(
        {"epochs": 4, "batch_size": 8, "save_every": 0, "optimizer": {"lr": 3e-3}}
    )
    stage = Stage("reward", tmp_path / "run", config.steps(32), 0, config)
    runner = ModelRunner(model)
    train_reward_model(config, runner, Mixture([pairs[:32]], [1.0], seed=0), stage)
    assert pair_accuracy(runner, pairs[32:]) == 1.0


def test_a_critic_starts_from_any_policy_or_reward_model(tmp_path: Path) -> None:
    """GPT-2's class is no `...ForCausalLM`; an adapter's folder has no weights of a whole model."""
    save_model(tmp_path / "gpt2", random_model("gpt2"), tiny_tokenizer(), "a card")
    model = random_model("llama")
    save_model(tmp_path / "base", model, tiny_tokenizer(), "a card")
    add_adapter(model, AdapterConfig(rank=2))
    lora = AdapterConfig(save="adapter")
    save_model(
        tmp_path / "lora", model, tiny_tokenizer(), "a card", lora, str(tmp_path / "base")
    )  # fmt: skip
    batch = pack_trajectories(episodes([False], [1.0]))
    for name in ("gpt2", "lora"):
        critic = load_critic(TINY, str(tmp_path / name), str)
        assert isinstance(critic, TokenCritic)
        assert not critic.head.linear.weight.any() and critic(batch).tolist() == [0.0] * 4
        assert all(p.requires_grad for p in critic.parameters())


def test_a_critic_must_take_the_longest_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "short", random_model("llama"), tiny_tokenizer(), "a card")
    recipe = Path(__file__).parents[1] / "smoke" / "tiny.yaml"
    words = ["rl", str(recipe), f"run.dir={tmp_path / 'run'}", "sft=null", "reward=null"]
    critic = ["rl.advantage.name=gae", "rl.value.kind=critic"]
    for key, value in (("rl.value.init_from", critic), ("rl.kl.reference", ["rl.kl.beta=1"])):
        with pytest.raises(SystemExit):
            main([*words, *value, f"{key}={tmp_path / 'short'}", f"run.dir={tmp_path / key}"])
        printed = capsys.readouterr().err
        assert f"{key}: {tmp_path / 'short'} takes 256 tokens" in printed
        assert "set engine.max_length=256" in printed
