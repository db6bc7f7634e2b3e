"""The hybrid engine: one copy of the weights, and two gears to run it in.

    engine = HybridEngine(model, tokenizer, EngineConfig())
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(n=8, max_new_tokens=128))
    with engine.training():
        scores = engine.logprobs(batch)
        loss.backward(); optimizer.step(); engine.weights_changed()

The gears share parameters, attention arithmetic and head; they differ in what they keep (a cache or
a graph).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.data.chat import end_token_ids
from gearshift.engine.cache import KVCache
from gearshift.engine.decode import forward
from gearshift.engine.scheduler import Sampled, Scheduler, StopRule, completion
from gearshift.engine.weights import AliasedWeights
from gearshift.errors import CapacityError, GearshiftError
from gearshift.models.attention import ATTENTION, require_attention
from gearshift.models.describe import check_head, describe, head_of
from gearshift.models.forward import hidden_states, token_scores
from gearshift.models.load import end_tokens
from gearshift.models.logprobs import TokenScores
from gearshift.runtime.config import Config
from gearshift.types import Completion, PackedBatch, SamplingParams

Gear = Literal["training", "generation"]


class EngineConfig(Config):
    """Bounds of the generation gear."""

    max_rows: int = Field(64, ge=1)
    """Completions that decode together."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt plus completion; None takes the model's."""
    prefill_tokens: int = Field(8192, ge=1)
    """Prompt tokens that one prefill computes together."""
    keep_cache: bool = True
    """Keep the cache's memory while training; false gives it back at each shift."""


class HybridEngine:
    """One causal language model, trained and sampled in place. See the module's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Fuse the weights of a described architecture, check the head; raises `ModelError`."""
        self.model, self.tokenizer = model, tokenizer
        self.config, self.seed = config or EngineConfig(), seed
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        model.eval()
        self.plan = describe(model)
        self.weights = AliasedWeights(self.plan) if self.plan else None
        self.end_tokens = end_tokens(model, tokenizer) | end_token_ids(tokenizer)
        self.weights_version = 0
        self.gear: Gear | None = None
        self._cache: KVCache | None = None
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2**20
        return min(longest, self.config.max_length or longest)

    @contextmanager
    def generating(self) -> Iterator[HybridEngine]:
        """Generation gear: no gradients, dropout off. Nests; the gear before comes back after."""
        with self._shifted("generation"), torch.no_grad():
            yield self

    @contextmanager
    def training(self, dropout: bool = False) -> Iterator[HybridEngine]:
        """Training gear. Dropout is off unless asked for, as reinforcement learning needs: the
        policy that is scored must be the policy that sampled.
        """
        with self._shifted("training"), torch.enable_grad():
            was = self.model.training
            self.model.train(dropout)
            try:
                yield self
            finally:
                self.model.train(was)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order.

        What is sampled is a function of (seed, request id, sample, position) and the weights only:
        not of the other prompts, nor of how many rows run together. Request ids default to 0, 1,
        ...
        Raises `CapacityError` for an empty prompt, or one that leaves no room for `max_new_tokens`.
        """
        params = params or SamplingParams()
        scheduler, groups = self._schedule(prompts, params, request_ids)
        while not scheduler.done:
            scheduler.step()
        return [[completion(s, self.weights_version) for s in group] for group in groups]

    def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, request_id: int = 0
    ) -> Iterator[int]:
        """The tokens of one completion as they are sampled, the same that `generate` would give."""
        params = params or SamplingParams()
        scheduler, [[sequence]] = self._schedule([prompt], params, [request_id], n=1)
        while not scheduler.done:
            scheduler.step()
            yield sequence.token_ids[-1]

    def logprobs(
        self, batch: PackedBatch, temperature: float = 1.0, value_head: nn.Module | None = None
    ) -> TokenScores:
        """Log-probs, entropy (and values) of the batch's scored tokens; see
        `models.forward.token_scores`.
        """
        self._require("training", "logprobs")
        return token_scores(self.model, batch, temperature, value_head)

    def weights_changed(self) -> None:
        """Say that the parameters were written: a new version begins."""
        self.weights_version += 1

    def memory(self) -> dict[str, int]:
        """Bytes by purpose. `aliased` is part of `weights`, not a copy."""
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "aliased": self.weights.bytes() if self.weights else 0,
            "cache": self._cache.bytes() if self._cache else 0,
        }

    @contextmanager
    def _shifted(self, gear: Gear) -> Iterator[None]:
        before = self.gear
        if gear != before:
            require_attention(self.model)
            if self.weights is not None:
                self.weights.check()
            if gear == "training" and not self.config.keep_cache:
                self._cache = None
        self.gear = gear
        try:
            yield
        finally:
            self.gear = before

    def _require(self, gear: Gear, what: str) -> None:
        if self.gear != gear:
            manager = "generating" if gear == "generation" else "training"
            raise GearshiftError(
                f"{what} needs the {gear} gear; call it inside `with engine.{manager}()`."
            )

    def _schedule(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        request_ids: Sequence[int] | None,
        n: int | None = None,
    ) -> tuple[Scheduler, list[list[Sampled]]]:
        self._require("generation", "Sampling")
        request_ids = range(len(prompts)) if request_ids is None else request_ids
        for i, prompt in enumerate(prompts):
            self._check_room(i, len(prompt), params.max_new_tokens)
        groups = [
            [Sampled(list(prompt), request_id, j) for j in range(n or params.n)]
            for prompt, request_id in zip(prompts, request_ids, strict=True)
        ]
        longest = max((len(prompt) for prompt in prompts), default=0) + params.max_new_tokens
        rows = min(self.config.max_rows, sum(len(group) for group in groups))
        head = head_of(self.model)
        scheduler = Scheduler(
            groups,
            params,
            StopRule(self.end_tokens, params.max_new_tokens, params.stop, self.tokenizer.decode),
            self._room(rows, longest),
            lambda ids, layout: forward(self.model, self.plan, self.weights, ids, layout),
            head.logits,
            self.seed if params.seed is None else params.seed,
            self.config.prefill_tokens,
            self.device,
        )
        return scheduler, groups

    def _check_room(self, index: int, length: int, new: int) -> None:
        if length == 0:
            raise CapacityError(f"Prompt {index} is empty; give at least one token.")
        if length + new > self.max_length:
            raise CapacityError(
                f"Prompt {index} has {length} tokens, and with max_new_tokens={new} passes the "
                f"limit of {self.max_length}; shorten the prompt or lower max_new_tokens."
            )

    def _room(self, rows: int, length: int) -> KVCache:
        """A cache of at least this size; the one at hand where it is large enough."""
        cache = self._cache
        if cache is None or cache.allocated < rows or cache.length < length:
            grown = (
                (rows, length)
                if cache is None
                else (max(rows, cache.allocated), max(length, cache.length))
            )
            self._cache = cache = KVCache(*grown)
        cache.open(rows)
        return cache

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(3, 9, device=self.device) % self.model.config.vocab_size
        cu = torch.tensor([0, len(ids)])
        mask = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        positions = torch.arange(len(ids), device=self.device)
        batch = PackedBatch(ids, positions, cu, torch.tensor([-1]), mask)
        check_head(self.model, hidden_states(self.model, batch), ids)
