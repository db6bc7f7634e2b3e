"""Turns sequences into scores: a reward model's forward, for training and for scoring.

Any backbone that `AutoModelForSequenceClassification` loads, decoder or encoder; so the forward is
Hugging Face's own, on padded rows, and a saved model scores elsewhere exactly as it did here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.batch import PackedBatch, pack
from gearshift.errors import CapacityError
from gearshift.models.exact import context_length
from gearshift.models.vocabulary import check_vocabulary

_OWN_PAD = "<|pad|>"


def use_own_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the pair a pad token that no text ends with: one that the vocabulary has to spare, or a
    token of its own.

    A decoder classifier of Hugging Face reads the score at the last token that is not the pad: with
    pad = end, at the token before the end. Rows are padded on the right: absolute positions do not
    move then.

    Raises `ModelError` if the tokenizer has tokens that the model lacks.
    """
    check_vocabulary(model, tokenizer)
    config = model.config.get_text_config()
    pad = next((t for t in _pads(tokenizer, config.pad_token_id) if _spare(tokenizer, t)), _OWN_PAD)
    tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.padding_side = "right"
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        with torch.random.fork_rng(devices=[]):
            grown = model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
        grown.weight.data[rows:] = 0.0
    model.config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def _pads(tokenizer: PreTrainedTokenizerBase, configured: int | None) -> Iterator[str | None]:
    """Tokens that could be the pad, the likeliest first."""
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    yield tokenizer.pad_token
    yield special.get(configured)
    yield from (token for token in special.values() if "pad" in token.lower())
    yield from (tokenizer.unk_token, tokenizer.bos_token)


def _spare(tokenizer: PreTrainedTokenizerBase, token: str | None) -> bool:
    """Whether no text ends with this token: it is not the end token, and no template writes it."""
    return (
        token is not None
        and token not in (tokenizer.eos_token, "")
        and (token not in str(tokenizer.chat_template))
    )


def pack_unscored(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Token sequences, none of which continues another one, as a batch."""
    return pack([(ids, [0] * len(ids)) for ids in sequences])


def leaves(batch: PackedBatch) -> list[int]:
    """The sequences that no other one continues."""
    parents = set(batch.parents.tolist())
    return [i for i in range(len(batch.parents)) if i not in parents]


def whole_sequences(batch: PackedBatch) -> list[list[int]]:
    """Token ids of each leaf, those that it continues first."""
    starts, parents = batch.cu_seqlens.tolist(), batch.parents.tolist()
    ids, whole = batch.input_ids.tolist(), []
    for leaf in leaves(batch):
        row: list[int] = []
        while leaf >= 0:
            row, leaf = ids[starts[leaf] : starts[leaf + 1]] + row, parents[leaf]
        whole.append(row)
    return whole


def padded_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[N] float32: the score of each token sequence. Gradients flow if they are enabled.

    A decoder's is read at the last token, whatever that is; an encoder's by its own pooling. Raises
    `CapacityError` for a sequence longer than the model takes.
    """
    if not reads_last_token(model):
        return _padded(model, model, sequences).logits[:, 0].float()
    states_NLH = _padded(model, model.base_model, sequences).last_hidden_state
    last_N = torch.tensor([len(s) - 1 for s in sequences], device=states_NLH.device)
    rows_N = torch.arange(len(sequences), device=states_NLH.device)
    scores: Tensor = model.score(states_NLH[rows_N, last_N])[:, 0].float()
    return scores


def padded_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[T] float32: a token classifier's one logit of each token of these sequences, end to end.

    Raises `CapacityError` for a sequence longer than the model takes.
    """
    logits = _padded(model, model, sequences).logits[..., 0].float()
    return torch.cat([row[: len(s)] for row, s in zip(logits, sequences, strict=True)])


def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether the score is a linear map of a decoder's last state."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def context(model: PreTrainedModel) -> int:
    """The greatest number of tokens that the model accepts."""
    longest = context_length(model.config) or 2**20
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            return min(longest, module.num_embeddings - 1 - first)  # RoBERTa's kind
    return longest


def _padded(model: PreTrainedModel, part: nn.Module, sequences: Sequence[Sequence[int]]) -> Any:
    """The output of the model, or of a part of it, for these sequences, padded on the right."""
    longest, limit = max(map(len, sequences)), context(model)
    if longest > limit:
        raise CapacityError(
            f"A sequence of {longest} tokens is longer than the reward model's {limit}; "
            "shorten the prompt or lower max_new_tokens."
        )
    pad = max(0, model.config.get_text_config().pad_token_id or 0)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    device = model.device
    return part(input_ids=ids.to(device), attention_mask=mask.to(device))
