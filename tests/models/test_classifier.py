"""A reward model gives one value: trained, asked here, asked by Hugging Face, and as a critic; also
where its pad token is its end token, or there is none.
"""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from gearshift.batch import pack
from gearshift.data.reward_input import render_reward_input
from gearshift.errors import CapacityError
from gearshift.models.classifier import context, padded_scores, use_own_pad
from gearshift.models.load import ModelConfig, load_classifier, load_tokenizer, save_model
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rewards.models import ModelReward
from gearshift.trainers.reward_model import Pair, score_pairs
from gearshift.trainers.rl.critic import TokenCritic, load_critic
from tests.zoo import hf_scores, random_model

CPU = ModelConfig(dtype="float32", device="cpu")
PROMPT = [{"role": "user", "content": "Which?"}]
ANSWERS = ["This one.", "That, and also the other one."]
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """With one special token, as GPT-2; `named`: with a pad that nothing calls so, as Pythia;
    `config`: with one that only the model's config knows; `template`: with a pad that is not EOS,
    but what ends an answer.
    """
    tokenizer = tiny_tokenizer()
    one = "<|endoftext|>"
    if kind == "template":
        tokenizer.add_special_tokens({"eos_token": one, "pad_token": "<|im_end|>"})
        return tokenizer
    tokenizer.add_special_tokens({"eos_token": one, "bos_token": one, "unk_token": one})
    tokenizer.pad_token = one if kind == "end" else None
    if spare := {"named": "<|padding|>", "config": "<|reserved|>"}.get(kind):
        tokenizer.add_special_tokens({"additional_special_tokens": [spare]})
    tokenizer.chat_template = PLAIN
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(params=["end", "none", "named", "config", "template"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(kind: str, family: str, tmp_path: Path) -> Path:
    tokenizer, model = tokenizer_of(kind), random_model(family)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.config.pad_token_id = {"end": 0, "named": -1, "config": 259, "template": 2}.get(kind)
    if kind in ("named", "config"):
        model.resize_token_embeddings(264, mean_resizing=False)
    save_model(tmp_path / "policy", model, tokenizer, "a card")
    return tmp_path / "policy"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "opt"])
def test_one_value_everywhere(policy: Path, tmp_path: Path) -> None:
    model, tokenizer = (
        load_classifier(CPU, str(policy), fresh_head=True),
        load_tokenizer(CPU, str(policy)),
    )
    rows = [render_reward_input(tokenizer, PROMPT, answer) for answer in ANSWERS]
    with torch.no_grad():
        states = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
        wanted = pytest.approx([float(model.score(state)) for state in states], abs=1e-5)
    use_own_pad(model, tokenizer)
    with torch.no_grad():
        assert score_pairs(ModelRunner(model), [Pair(*rows)]).tolist() == wanted
        assert padded_scores(model, rows).tolist() == wanted
    assert hf_scores(model, rows) == wanted
    saved = tmp_path / "reward"
    save_model(saved, model, tokenizer, "a card")
    assert ModelReward(CPU, saved)([PROMPT] * 2, ANSWERS) == wanted

    theirs = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    batch = AutoTokenizer.from_pretrained(saved)(
        [tokenizer.decode(ids) for ids in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert theirs(**batch).logits[:, 0].tolist() == wanted

    critic = load_critic(CPU, str(saved), str)
    assert isinstance(critic, TokenCritic)
    for ids, score in zip(rows, wanted.expected, strict=True):
        more = pack([([*ids, 5], [0] * len(ids) + [1])])
        with torch.no_grad():
            assert float(critic(more)) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["end"])
@pytest.mark.parametrize("family", ["gpt2"])
def test_a_reward_model_from_elsewhere_scores_as_it_does_there(policy: Path) -> None:
    """Where it was trained with pad = end, its score stands before the end."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(policy)
    theirs = AutoModelForSequenceClassification.from_pretrained(policy)
    rows = [render_reward_input(tokenizer, PROMPT, answer) for answer in ANSWERS]
    with torch.no_grad():
        wanted = [float(theirs(torch.tensor([ids])).logits) for ids in rows]
    assert ModelReward(CPU, policy)([PROMPT] * 2, ANSWERS) == pytest.approx(wanted, abs=1e-5)


def test_positions_that_are_counted_from_the_pad_on() -> None:
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=34, num_labels=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    assert context(model) == 32
    hf_scores(model, [[5] * 32, [5]])
    with pytest.raises(CapacityError, match="33 tokens is longer than the reward model's 32"):
        hf_scores(model, [[5] * 33])
    assert hf_scores(model, []) == []
