"""How many floating-point operations a model's training takes, for its share of what a device can
do (model FLOPs utilisation).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.models.describe import Plan


class TrainingWork:
    """Counts the operations of forwards with gradients and of their backward passes.

    A product of T tokens with a matrix takes 2 operations a token and element, as many for the
    gradient of its input, and as many for the gradient of the matrix if that is trained. Attention
    of a token over n positions takes 4 n Q D operations in a layer, and twice that in the backward
    pass. What is computed again to save memory does not count (Chowdhery et al. 2022, appendix B).
    The head counts for scored tokens alone, because no other token needs it.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan | None) -> None:
        """Without a plan only tokens are counted: nothing says which weights a token meets."""
        self._model, self._plan = model, plan
        layers = plan.layers if plan else ()
        self._windows = Counter(layer.attention.window for layer in layers)
        self._tokens = 0
        self._scored: list[Tensor] = []
        self._positions: list[Tensor] = []
        """How many positions the tokens of a batch see in all layers."""

    def add(self, batch: PackedBatch) -> None:
        """Count the layers of this batch, if gradients are enabled. It does not wait for a GPU."""
        if not torch.is_grad_enabled():
            return
        self._tokens += len(batch)
        seen = batch.position_ids + 1
        self._positions += [
            layers * (seen if window is None else seen.clamp(max=window)).sum()
            for window, layers in self._windows.items()
        ]

    def add_head(self, batch: PackedBatch) -> None:
        """Count the head for the batch's scored tokens, if gradients are enabled."""
        if torch.is_grad_enabled():
            self._scored.append(batch.loss_mask.sum())

    def take(self) -> tuple[int, float]:
        """The tokens and the operations since the last call; 0 operations without a plan."""
        tokens, scored = self._tokens, sum(map(int, self._scored))
        positions = sum(map(int, self._positions))
        self._tokens, self._scored, self._positions = 0, [], []
        if self._plan is None:
            return tokens, 0.0
        body = sum(_per_token(layer.unit) for layer in self._plan.layers)
        head = self._model.get_output_embeddings()
        attention = 12 * self._plan.heads * self._plan.head_size * positions
        return tokens, float(tokens * body + (scored * _per_token(head) if head else 0) + attention)


def _per_token(module: nn.Module) -> int:
    """Operations of one token in the module's matrices, forward and backward."""
    matrices = (p for p in module.parameters() if p.ndim > 1)
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)
