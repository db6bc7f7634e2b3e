"""One forward of the generation gear: it takes tokens with their positions, gives logits, and
caches keys and values. It knows no request.

A described architecture runs as plain functions over the aliased buffers; any other runs through
the Hugging Face forward, with the same cache and the same attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.block_cache import KVCache
from gearshift.errors import ModelError
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import AttentionMetadata, AttentionOptions
from gearshift.models.describe import Plan, trunk_of
from gearshift.models.fused import AliasedWeights
from gearshift.models.layers import Angles, embed, layers
from gearshift.models.runner import ModelRunner


class CachedForward:
    """A model in the generation gear."""

    def __init__(
        self, runner: ModelRunner, kernels: Kernels, cache: KVCache, max_length: int
    ) -> None:
        """`max_length`: no token stands at this position or beyond."""
        assert runner.head is not None, "the engine makes sure"
        self.model, self.plan, self.weights = runner.model, runner.plan, runner.weights
        self.head, self.kernels, self.cache = runner.head, kernels, cache
        self.max_length = max_length

    def __call__(self, input_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """[T] token ids -> [B, V] logits of those that the metadata names."""
        with self._batch_invariant():
            if self.plan is None or self.weights is None:
                return self._logits(self._hf_forward(input_ids, metadata))
            x, angles = embed(self.plan, input_ids, metadata.positions)
            return self.described(self.plan, self.weights, x, angles, metadata)

    def described(
        self,
        plan: Plan,
        weights: AliasedWeights,
        x: Tensor,
        angles: Angles,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """[T, H] embeddings of a described model's tokens -> logits."""

        def attention(
            layer: int,
            qkv: Tensor,
            rotary: tuple[Tensor, Tensor] | None,
            options: AttentionOptions,
        ) -> Tensor:
            store = self.cache.layer(layer, qkv[:, : plan.kv_heads])
            query = self.kernels.apply_rotary_and_write(qkv, rotary, store, metadata)
            return self.kernels.attend(query, store, metadata, options)

        hidden = layers(
            plan,
            weights,
            self.kernels,
            x,
            angles,
            attention,
            metadata.logits_indices,
            multiply=self.kernels.linear,
        )
        return self._logits(hidden)

    def _batch_invariant(self) -> AbstractContextManager[Any]:
        """Tensor operations that may sum in any order are made to use one order."""
        fine, plan = self.model.dtype == torch.float32, self.plan
        if self.head.softcap is not None:
            return self.kernels.batch_invariant()
        if fine and (plan is None or not all(isinstance(y.act, str) for y in plan.layers)):
            return self.kernels.batch_invariant()
        return nullcontext()

    def _hf_forward(self, input_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """[T] token ids -> [B, H] states, through Hugging Face's own modules."""
        out = trunk_of(self.model)(
            input_ids=input_ids[None],
            position_ids=metadata.positions[None],
            use_cache=False,
            layout=CachedLayout(self.kernels, self.cache, metadata),
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden if metadata.logits_indices is None else hidden[metadata.logits_indices]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.weights is None:
            return self.head.shaped(self.head.linear(hidden))
        return self.head.shaped(self.weights.head(hidden, self.kernels.linear))


class CachedLayout:
    """The attention of a Hugging Face model in the generation gear: keys are written, then read."""

    def __init__(self, kernels: Kernels, cache: KVCache, metadata: AttentionMetadata) -> None:
        self.kernels, self.cache, self.metadata = kernels, cache, metadata
        self._written: set[int] = set()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, Q, T, D] queries, [1, K, T, D] new keys and values -> [1, Q, T, D]."""
        if layer in self._written:
            raise ModelError("it attends more than once in a layer, and a layer has one cache")
        self._written.add(layer)
        qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).contiguous()
        store = self.cache.layer(layer, qkv[:, : key.shape[1]])
        query = self.kernels.apply_rotary_and_write(qkv, None, store, self.metadata)
        return self.kernels.attend(query, store, self.metadata, options).transpose(0, 1)[None]
