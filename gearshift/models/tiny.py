"""Random Llama models of a few thousand weights, with a byte-level tokenizer: for tests, and for
games that a model learns without a pretrained policy. It must not import the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"hidden_size": 64, "initializer_range": 0.06},
}
"""Their names in recipes, and the arguments of `tiny_model` that make them."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte and three ChatML markers, 259 tokens in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    return fast


def tiny_model(
    hidden_size: int = 32,
    layers: int = 2,
    vocab_size: int = 259,
    seed: int = 0,
    initializer_range: float = 0.2,
) -> LlamaForCausalLM:
    """A Llama with grouped-query attention and tied embeddings, its weights drawn from `seed`, in
    fp32. A wide `initializer_range` makes the probabilities of tokens differ, as tests need it; a
    model with a narrower one learns better.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
