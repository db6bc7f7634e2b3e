"""Value nets with weights and an optimizer of their own: a decoder that values every token, from
the policy's weights or a reward model's (as DeepSpeed-Chat starts it); or an encoder that values
the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from gearshift.engine import PackedModel
from gearshift.models.classifier import sequence_scores, use_own_pad
from gearshift.models.heads import ValueHead
from gearshift.models.load import ModelConfig, load_classifier, load_policy, load_tokenizer
from gearshift.types import PackedBatch

Decode = Callable[[list[int]], str]


class Critic(Protocol):
    """What the loop asks of a critic."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds of it."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        """[M] values of the scored tokens, each from what was known before it."""

    def parameters(self) -> list[nn.Parameter]:
        """What its optimizer trains."""


class TokenCritic:
    """A decoder with a value head: V of the state before each token."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead) -> None:
        self.modules: dict[str, nn.Module] = {"critic": trunk, "value_head": head}
        self.trunk, self.head = trunk, head
        self._states = PackedModel(trunk)

    def __call__(self, batch: PackedBatch) -> Tensor:
        values: Tensor = self.head(self._states(batch)[batch.predictors])
        return values

    def parameters(self) -> list[nn.Parameter]:
        """Of head and trunk; a language-model head has no part in values."""
        output = self.trunk.get_output_embeddings()
        tied = output is None or output.weight is self.trunk.get_input_embeddings().weight
        unused = set() if tied else {id(p) for p in output.parameters()}
        trunk = [p for p in self.trunk.parameters() if id(p) not in unused]
        return [*self.head.parameters(), *trunk]


class PromptCritic:
    """An encoder with a score: V of the prompt, the same for every token that answers it.

    An encoder reads both ways, so it is shown nothing that the policy has written: a baseline that
    knew the answer would bias the gradient. It reads the prompt's text in its own tokens.
    """

    def __init__(self, config: ModelConfig, folder: str, decode: Decode) -> None:
        self.model = load_classifier(config, folder)
        self.modules: dict[str, nn.Module] = {"critic": self.model}
        self._tokenizer, self._decode = load_tokenizer(config, folder), decode
        use_own_pad(self.model, self._tokenizer)

    def __call__(self, batch: PackedBatch) -> Tensor:
        parents, starts = batch.parents.tolist(), batch.cu_seqlens.tolist()
        roots = [i for i, parent in enumerate(parents) if parent < 0]
        texts = [self._decode(batch.input_ids[starts[r] : starts[r + 1]].tolist()) for r in roots]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        encoded = self._tokenizer(texts, truncation=longest is not None, max_length=longest)
        of_root = sequence_scores(self.model, encoded["input_ids"])
        index: list[int] = []
        for i, parent in enumerate(parents):
            index.append(roots.index(i) if parent < 0 else index[parent])
        return torch.repeat_interleave(of_root[index], batch.counts.to(of_root.device))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


def load_critic(config: ModelConfig, folder: str | None, decode: Decode) -> Critic:
    """A critic from a policy's folder, its head zero; from a reward model's, with its score head;
    or, where that is an encoder, of the prompt. `decode`: the policy's tokens to text.
    """
    if folder and _is_encoder(folder):
        return PromptCritic(config, folder, decode)
    trunk = load_policy(config, folder)
    head = ValueHead(trunk.config.hidden_size).to(trunk.device)
    weights = Path(folder or "") / "model.safetensors"
    if weights.is_file():
        with safe_open(str(weights), "pt") as saved, torch.no_grad():
            if "score.weight" in saved.keys():  # noqa: SIM118  # not a dict
                head.linear.weight.copy_(saved.get_tensor("score.weight").float())
    return TokenCritic(trunk, head)


def _is_encoder(folder: str) -> bool:
    """Whether the model there reads both ways: a classifier without a causal model's score head."""
    if not (Path(folder) / "config.json").is_file():
        return False
    [kind, *_] = AutoConfig.from_pretrained(folder).architectures or [""]
    weights = Path(folder) / "model.safetensors"
    if kind.endswith("ForCausalLM") or not weights.is_file():
        return False
    with safe_open(str(weights), "pt") as saved:
        return "score.weight" not in saved.keys()  # noqa: SIM118
