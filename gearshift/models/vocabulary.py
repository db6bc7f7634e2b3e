"""Checks that a model and a tokenizer have the same tokens. A token outside the embedding is
refused when the two are opened: later it would be an index error, which on a GPU ends the process.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.errors import ConfigError, ModelError


class Policy(Protocol):
    """A policy's vocabulary, as an engine has it."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int


_MEDIA = ("image", "audio", "video")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Token ids that the model both reads and, if it has a head, writes. It may have more rows than
    the tokenizer has tokens.

    Raises `ModelError` if it could write a token that it cannot read.
    """
    read, head = _rows(model.get_input_embeddings()), _rows(model.get_output_embeddings())
    if read is not None and head is not None and head > read:
        raise ModelError(
            f"The head of {type(model).__name__} has {head} rows and its embedding {read}, so a "
            "sampled token may have no embedding; resize both with resize_token_embeddings."
        )
    rows = [size for size in (read, head) if size is not None]
    return min(rows) if rows else int(model.config.get_text_config(decoder=True).vocab_size)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The model's vocabulary size.

    Raises `ModelError` where the tokenizer, or the model's own configuration, names a token beyond
    it. What stands for images and sounds (`tokenizer.image_token`) may lie beyond: checkpoints
    that read text alone keep it, and a prompt with it is refused.
    """
    size = vocabulary_size(model)
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in _MEDIA}
    known = {token: i for token, i in tokenizer.get_vocab().items() if token not in media}
    known["which it adds to a text"] = max(tokenizer.encode(""), default=-1)
    token, last = max(known.items(), key=lambda entry: entry[1])
    if last >= size:
        raise ModelError(
            f"The tokenizer knows token {last} ({token!r}) and {type(model).__name__} only {size} "
            "tokens; take the model's own tokenizer, or call "
            f"model.resize_token_embeddings({last + 1}) and save the model."
        )
    text = model.config.get_text_config(decoder=True)
    generation = getattr(model, "generation_config", None)
    for name in ("eos_token_id", "pad_token_id"):
        default = getattr(type(text), name, None)  # of the family, not of this checkpoint
        for where, config in (("generation_config", generation), ("config", text)):
            ids = getattr(config, name, None)
            for i in ids if isinstance(ids, list) else [ids]:
                none = i is None or i == default or (name == "pad_token_id" and i == -1)
                if not none and not (isinstance(i, int) and 0 <= i < size):
                    raise ModelError(
                        f"{where}.{name} of {type(model).__name__} is {i}, beyond its {size} "
                        "tokens; set it to a token of the tokenizer and save the model."
                    )
    return size


def check_same_tokens(
    key: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy
) -> None:
    """Raises `ConfigError`, which names the recipe's key, if this model, which is shown the
    policy's tokens, reads other words in them, or has too few.
    """
    other, own = tokenizer.get_vocab(), policy.tokenizer.get_vocab()
    moved = next((token for token, i in own.items() if other.get(token) != i), None)
    if moved is not None or vocabulary_size(model) < policy.vocabulary:
        reason = "has fewer tokens" if moved is None else f"has {moved!r} at another place"
        raise ConfigError(
            f"{key} reads the policy's tokens, but {reason}; name a model with the same tokenizer."
        )


def _rows(module: nn.Module | None) -> int | None:
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])
