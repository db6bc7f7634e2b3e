"""A model that only scores (a reference, a critic), run as the training gear runs the policy."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.engine.check import check
from gearshift.kernels.dispatch import kernels_of
from gearshift.models.describe import describe, head_of
from gearshift.models.fused import AliasedWeights
from gearshift.models.hf_forward import has_active_dropout, hidden_states
from gearshift.models.layers import packed_states


class PackedModel:
    """The last hidden states of a model that only scores (a reference, a critic), as the training
    gear computes the policy's: by its plan, or by its own modules where it has none.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module | None = None) -> None:
        """`head`: of a model that has none for tokens (a classifier's score)."""
        self.model, self.plan = model, describe(model)
        self.weights: AliasedWeights | None = None
        if self.plan:
            self.weights = AliasedWeights(self.plan, head or head_of(model).linear)
        self.kernels = kernels_of(model)
        states = self._planned if self.plan else None
        self.limit = check(model, self.plan, states, head=head is None)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """[T, C]."""
        if self.limit:
            self.limit.check(batch)
        if self.plan is None or has_active_dropout(self.model):
            return hidden_states(self.model, batch)
        return self._planned(batch)

    def _planned(self, batch: PackedBatch) -> Tensor:
        assert self.plan is not None and self.weights is not None
        return packed_states(self.plan, self.weights, self.kernels, batch)
