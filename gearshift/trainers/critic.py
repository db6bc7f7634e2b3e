"""The value net: a head on the policy's own trunk, or a critic with weights and an optimizer of its
own, from the policy's weights or from a reward model's (as DeepSpeed-Chat starts it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.engine import PackedModel
from gearshift.errors import ModelError
from gearshift.models.heads import ValueHead
from gearshift.models.load import ModelConfig, load_policy
from gearshift.types import PackedBatch


@dataclass
class Critic:
    """A trunk and its head."""

    trunk: PreTrainedModel
    head: ValueHead

    def __post_init__(self) -> None:
        self._states = PackedModel(self.trunk)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """[M] values of the scored tokens, each from the tokens before it."""
        values: Tensor = self.head(self._states(batch)[batch.predictors])
        return values

    def parameters(self) -> list[nn.Parameter]:
        """Of head and trunk; a language-model head has no part in values."""
        output = self.trunk.get_output_embeddings()
        tied = output is None or output.weight is self.trunk.get_input_embeddings().weight
        unused = set() if tied else {id(p) for p in output.parameters()}
        trunk = [p for p in self.trunk.parameters() if id(p) not in unused]
        return [*self.head.parameters(), *trunk]


def load_critic(config: ModelConfig, folder: str | None) -> Critic:
    """A critic from a policy's folder, its head zero; or from a reward model's, with its score
    head.

    Raises `ModelError` for a reward model whose backbone reads both ways: its states know what
    comes after a token, which a baseline must not.
    """
    trunk = load_policy(config, folder)
    head = ValueHead(trunk.config.hidden_size).to(trunk.device)
    weights = Path(folder or "") / "model.safetensors"
    if weights.is_file():
        with safe_open(str(weights), "pt") as saved:
            if "score.weight" in saved.keys():  # noqa: SIM118  # not a dict
                with torch.no_grad():
                    head.linear.weight.copy_(saved.get_tensor("score.weight").float())
            elif "classifier.weight" in saved.keys():  # noqa: SIM118
                raise ModelError(
                    f"{folder} is an encoder, whose states know what follows a token; "
                    "a critic needs a decoder: set rl.critic to another folder, or to null."
                )
    return Critic(trunk, head)
