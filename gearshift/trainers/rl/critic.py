"""Value nets with weights of their own: a decoder that values every token, from the policy's or a
reward model's weights (as DeepSpeed-Chat starts it); or an encoder that values the prompt.

This file must not import the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.batch import PackedBatch
from gearshift.models.attention import ATTENTION
from gearshift.models.classifier import context, pack_unscored, reads_last_token, use_own_pad
from gearshift.models.describe import head_of
from gearshift.models.heads import ValueHead
from gearshift.models.load import (
    ModelConfig,
    load_classifier,
    load_policy,
    load_tokenizer,
    writes_text,
)
from gearshift.models.runner import ModelRunner
from gearshift.models.sharded import ShardedModel

Decode = Callable[[list[int]], str]


class Critic(Protocol):
    """The interface that the trainer needs of a critic."""

    runner: ModelRunner
    """Runs its model."""

    @property
    def modules(self) -> dict[str, nn.Module | ShardedModel]:
        """The part of the critic that a checkpoint saves."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        """[M] values of the scored tokens, each from what was known before it."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that its optimizer trains."""


class TokenCritic:
    """A decoder with a value head: V of the state before each token."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead, keep_whole: bool = True) -> None:
        """For `keep_whole` see `ModelRunner`."""
        self.trunk, self.head = trunk, head
        self.runner = ModelRunner(trunk, value_head=head, keep_whole=keep_whole)

    @property
    def modules(self) -> dict[str, nn.Module | ShardedModel]:
        return {"critic": self.runner.stateful, "value_head": self.head}

    def __call__(self, batch: PackedBatch) -> Tensor:
        return self.runner.values(batch)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of head and trunk, without the head that the model came with."""
        self.runner.trained_parameters()  # the head that the model came with is not read
        return [*self.head.parameters(), *self.runner.learner.model.base_model.parameters()]


class PromptCritic:
    """An encoder with a score: V of the prompt, the same for every token that answers it.

    An encoder reads in both directions, so it gets nothing that the policy has written: a baseline
    that depends on the answer would bias the gradient. It reads the prompt's text in its own
    tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decode: Decode,
        keep_whole: bool = True,
    ) -> None:
        """`decode`: the policy's tokens to text. For `keep_whole` see `ModelRunner`."""
        self.model, self._tokenizer, self._decode = model, tokenizer, decode
        use_own_pad(model, tokenizer)
        self.runner = ModelRunner(model, keep_whole=keep_whole)

    @property
    def modules(self) -> dict[str, nn.Module | ShardedModel]:
        return {"critic": self.runner.stateful}

    def __call__(self, batch: PackedBatch) -> Tensor:
        parents, starts = batch.parents.tolist(), batch.cu_seqlens.tolist()
        roots = [i for i, parent in enumerate(parents) if parent < 0]
        texts = [self._decode(batch.input_ids[starts[r] : starts[r + 1]].tolist()) for r in roots]
        encoded = self._tokenizer(texts, truncation=True, max_length=context(self.model))
        of_root = self.runner.scores(pack_unscored(encoded["input_ids"]))
        index: list[int] = []
        for i, parent in enumerate(parents):
            index.append(roots.index(i) if parent < 0 else index[parent])
        return torch.repeat_interleave(of_root[index], batch.completion_lengths.to(of_root.device))

    def parameters(self) -> list[nn.Parameter]:
        return self.runner.trained_parameters()


def load_critic(
    config: ModelConfig, folder: str | None, decode: Decode, keep_whole: bool = True
) -> Critic:
    """Load a critic: from a policy's folder with a head of zeros, from a reward model's folder with
    its score head, or, if that is an encoder, a critic of the prompt. `decode`: the policy's tokens
    to text. For `keep_whole` see `ModelRunner`.
    """
    if folder is None or writes_text(config, folder):
        trunk = load_policy(config, folder)
        head = ValueHead(head_of(trunk).linear.in_features).to(trunk.device)
        return TokenCritic(trunk, head, keep_whole)
    model = load_classifier(config, folder)
    if not reads_last_token(model):
        tokenizer = load_tokenizer(config, folder, of_policy=False)
        return PromptCritic(model, tokenizer, decode, keep_whole)
    head = ValueHead(model.score.in_features).to(model.device)
    with torch.no_grad():
        head.linear.weight.copy_(model.score.weight)
    model.set_attn_implementation(ATTENTION)
    return TokenCritic(model, head, keep_whole)
