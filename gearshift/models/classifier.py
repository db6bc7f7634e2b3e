"""Sequences to scores: a reward model's forward, for training it and for asking it.

Any backbone that `AutoModelForSequenceClassification` loads, decoder or encoder; so the forward is
Hugging Face's own, on padded rows, and a saved model scores elsewhere exactly as it did here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.errors import CapacityError
from gearshift.models.vocabulary import check_vocabulary


def use_own_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the pair a pad token that is not the end token, where the vocabulary has one to spare.

    Decoder classifiers read the score at the last token that is not padding: with pad = end, the
    end of the text would be taken for padding.

    Raises `ModelError` if the tokenizer has tokens that the model lacks.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = next(
            (
                t
                for t in (tokenizer.unk_token, tokenizer.bos_token)
                if t not in (None, tokenizer.eos_token)
            ),
            None,
        )
        tokenizer.pad_token = spare or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    check_vocabulary(model, tokenizer)


def sequence_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[N] float32: the score of each token sequence. Gradients flow if they are enabled.

    Raises `CapacityError` for a sequence longer than the model takes.
    """
    return _padded_logits(model, sequences)[:, 0].float()


def token_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of a token classifier with one label: for each sequence [L] float32, a logit a token.

    Raises `CapacityError` for a sequence longer than the model takes.
    """
    logits = _padded_logits(model, sequences)[..., 0].float()
    return [row[: len(s)] for row, s in zip(logits, sequences, strict=True)]


def _padded_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    limit = getattr(model.config, "max_position_embeddings", None) or 2**20
    longest = max(len(s) for s in sequences)
    if longest > limit:
        raise CapacityError(
            f"A sequence of {longest} tokens is longer than the reward model's {limit}; "
            "shorten the "
            "prompt or lower max_new_tokens."
        )
    ids = torch.full((len(sequences), longest), model.config.pad_token_id or 0, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return logits


@torch.no_grad()
def score_all(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], max_tokens: int = 8192
) -> list[float]:
    """Scores of many sequences, in batches of similar length, without gradients."""
    scores = [0.0] * len(sequences)
    batch: list[int] = []
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for i, after in zip(order, [*order[1:], None], strict=True):
        batch.append(i)
        if after is None or len(sequences[after]) * (len(batch) + 1) > max_tokens:
            values = sequence_scores(model, [sequences[j] for j in batch]).tolist()
            for j, value in zip(batch, values, strict=True):
                scores[j] = value
            batch = []
    return scores
