"""The hybrid engine: one copy of the weights, and two gears to run it in.

    engine = Engine(model, tokenizer, EngineConfig())
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(n=8, max_new_tokens=128))
    with engine.training():
        scores = engine.logprobs(batch)
        loss.backward(); optimizer.step(); engine.weights_changed()

The gears share parameters, attention arithmetic and head; they differ in what they keep (a cache or
a graph).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.batch import PackedBatch
from gearshift.data.chat import end_token_ids
from gearshift.data.text import decode
from gearshift.engine import sequence as requests
from gearshift.engine.block_cache import KVCache
from gearshift.engine.decoder import Decoder
from gearshift.engine.owner import owner_of
from gearshift.engine.probe import decode_given
from gearshift.engine.scheduler import GenerationStats, Scheduler
from gearshift.engine.stats import measure
from gearshift.errors import CapacityError, ConfigError, GearshiftError, ModelError
from gearshift.kernels.dispatch import kernels_of
from gearshift.kernels.specs import BLOCK
from gearshift.models.adapters import adapted_layers, switched
from gearshift.models.attention import ATTENTION, require_attention
from gearshift.models.describe import head_of
from gearshift.models.exact import context_length, named
from gearshift.models.load import end_tokens
from gearshift.models.logprobs import TokenScores
from gearshift.models.runner import ModelRunner
from gearshift.models.vocabulary import check_vocabulary
from gearshift.runtime.config import Config
from gearshift.types import Completion, SamplingParams

Gear = Literal["training", "generation"]


class EngineConfig(Config):
    """Bounds of the generation gear."""

    max_num_seqs: int = Field(64, ge=1)
    """Completions that decode together."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt plus completion; None takes the model's."""
    max_num_batched_tokens: int = Field(4096, ge=1)
    """Prompt tokens that one prefill computes together."""
    kv_cache_tokens: int | None = Field(None, ge=1)
    """Tokens whose keys and values the cache holds at most; None makes room for `max_num_seqs` of
    the longest requests at hand. With less room, sequences wait or are computed again.
    """
    free_cache_while_training: bool = False
    """Give the memory of the cache and of the prepacked weights back at each shift to training."""
    recompute: bool | None = None
    """Keep only each layer's input of a training forward, and compute the layer again in the
    backward pass (activation checkpointing): a third more work, several times less memory. For
    described architectures; refused for others. None: a recipe does where one micro-batch would not
    fit else; off otherwise.
    """
    decode_steps_per_sync: int | None = Field(None, ge=1, le=BLOCK)
    """Tokens that each row samples before the scheduler looks at them: what a row samples beyond
    its end is thrown away, but a GPU need not wait for the scheduler. None: 8 on a GPU, 1 on a CPU.
    """
    prepack_weights: bool = True
    """Multiply by a copy of the weights in the CPU's own layout, made anew for each version, where
    that is faster (bf16 on a CPU that multiplies bf16).
    """


class Stream:
    """The tokens of one completion as they are sampled; other requests run on meanwhile."""

    def __init__(self, engine: Engine, sequence: requests.Sequence) -> None:
        self._engine, self._sequence, self._told = engine, sequence, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        while self._told == len(self._sequence.token_ids):
            if self._sequence.has_ended():
                raise StopIteration
            self._engine.step()
        self._told += 1
        return self._sequence.token_ids[self._told - 1]

    @property
    def ended(self) -> bool:
        """Whether its last token was sampled. Raises the error that ended it, if one did."""
        return self._sequence.has_ended()

    def abort(self) -> None:
        """End the request here; its part of the cache is free at once."""
        self._engine.abort(self._sequence)

    @property
    def completion(self) -> Completion:
        """What was written so far; `finish_reason` is `abort` until it has ended by itself."""
        return self._sequence.completion()


class Engine:
    """One causal language model, trained and sampled in place. See the module's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Fuse the weights of a described architecture, check the head and the vocabulary; raises
        `ModelError`, and `ConfigError` for a seed of more than 64 bits.
        """
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"The seed {seed} has more than 64 bits; take a smaller one.")
        self.model, self.tokenizer = model, tokenizer
        self._owner, self._stepping = owner_of(model), False
        self._owner.check(self)
        self.config, self.seed = config or EngineConfig(), seed
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        model.eval()
        self.head, self._home = head_of(model), self._where()
        self.vocabulary = check_vocabulary(model, tokenizer)
        self.end_tokens = end_tokens(model, tokenizer) | end_token_ids(tokenizer)
        self.weights_version = 0
        self.gear: Gear | None = None
        self.shift_seconds = 0.0
        recompute = bool(self.config.recompute)
        self.runner = ModelRunner(model, recompute=recompute, decode=self._probe)
        self._check_limit()
        self._addresses = self._found_at()
        self._seen = self._signs()
        self._scheduler: Scheduler | None = None
        self._timing = GenerationStats()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        longest = context_length(self.model.config) or 2**20
        return min(longest, self.config.max_length or longest)

    # Gears

    @contextmanager
    def generating(self) -> Iterator[Engine]:
        """Generation gear: no gradients, dropout off. Nests; the gear before comes back after."""
        with self._shifted("generation"), torch.no_grad():
            yield self

    @contextmanager
    def training(self, dropout: bool = False) -> Iterator[Engine]:
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

    def weights_changed(self) -> None:
        """Say that the parameters were written: a new version begins, and what the cache holds of
        the old one is forgotten. Raises `GearshiftError` while requests are on their way.
        """
        self._owner.check(self)
        if self._scheduler is not None:
            if not self._scheduler.idle:
                raise GearshiftError(
                    "The weights changed while requests were running; let them end, or abort them."
                )
            self._scheduler.cache.forget()
        self._seen = self._signs()
        self.weights_version += 1

    # Generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order; `params` may be one for all
        or one for each.

        What is sampled is a function of (seed, request id, sample, position) and the weights only:
        not of the other prompts, nor of how many rows run together. Request ids default to 0, 1,
        ...
        Raises `CapacityError` for an empty prompt, or one that leaves no room for `max_new_tokens`;
        `DataError` and `ConfigError` for tokens that are not in the vocabulary.
        """
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        request_ids = range(len(prompts)) if request_ids is None else request_ids
        groups = self._add(prompts, each, request_ids)
        try:
            while not all([s.has_ended() for group in groups for s in group]):
                self.step()
        except BaseException:  # an interrupt too: what nobody waits for must not run on
            for sequence in (s for group in groups for s in group):
                self.abort(sequence)
            raise
        return [[s.completion() for s in group] for group in groups]

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        request_ids: Sequence[int],
    ) -> list[list[Stream]]:
        """Begin what `generate` would complete, beside whatever runs; `step` writes it."""
        groups = self._add(prompts, [params] * len(prompts), request_ids)
        return [[Stream(self, sequence) for sequence in group] for group in groups]

    def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, request_id: int = 0
    ) -> Stream:
        """The tokens of one completion as they are sampled, the same that `generate` would give.

        The request runs beside others: of other streams, and of `generate`.
        """
        params = replace(params or SamplingParams(), n=1)
        [[sequence]] = self._add([prompt], [params], [request_id])
        return Stream(self, sequence)

    def step(self) -> None:
        """One token for every request on its way. `generate` and `stream` call it.

        An error or an interrupt in the middle ends every request, and the next one begins anew.
        """
        self._require("generation", "Sampling")
        if self._scheduler is None or self._scheduler.idle:
            raise GearshiftError("No request is running; an earlier error ended it: send it again.")
        if self._stepping:
            raise GearshiftError("A step called itself, by way of the tokenizer or a hook.")
        self._stepping = True
        try:
            if self._signs() != self._seen:
                self.weights_changed()
            self._scheduler.weights_version = self.weights_version
            self._scheduler.step()
        except BaseException:
            self._scheduler = None
            raise
        finally:
            self._stepping = False

    def abort(self, sequence: requests.Sequence) -> None:
        """End a request where it stands, if it has not ended."""
        if self._scheduler is not None and sequence.finish_reason is None:
            self._owner.check(self)
            self._scheduler.abort(sequence)

    # Training

    def logprobs(
        self, batch: PackedBatch, temperature: float = 1.0, value_head: nn.Module | None = None
    ) -> TokenScores:
        """Log-probs, entropy (and values) of the batch's scored tokens; see
        `ModelRunner.logprobs`.
        """
        self._require("training", "logprobs")
        return self.runner.logprobs(batch, temperature, value_head)

    # Reports

    def memory(self) -> dict[str, int]:
        """Bytes by purpose. `aliased` is part of `weights`, not a copy."""
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "gradients": sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None),
            "aliased": self.runner.weights.bytes() if self.runner.weights else 0,
            "prepacked": self.runner.weights.prepacked_bytes() if self.runner.weights else 0,
            "cache": self._scheduler.cache.bytes() if self._scheduler else 0,
            "steps": self.runner.kernels.workspace_bytes(),
        }

    def timing(self) -> GenerationStats:
        """What generation did since this was last asked, and begin anew."""
        done, self._timing = self._timing, GenerationStats()
        if self._scheduler is not None:
            self._scheduler.timing = self._timing
        return done

    def roofline_fraction(self, done: GenerationStats) -> float:
        """The time that decoding must take on this machine over the time it took: weights and
        cached positions read once a step, or their products, whichever takes longer.
        """
        if self._scheduler is None or not done.decode_steps:
            return float("nan")
        used = [p for p in self.model.parameters() if p is not self._embedding_only]
        weights, elements = sum(p.nbytes for p in used), sum(p.numel() for p in used)
        cache = self._scheduler.cache
        position = cache.bytes() / max(1, cache.blocks * BLOCK)
        read = done.decode_steps * weights + done.decode_positions * position
        roofline = measure(self.device, self.model.dtype)
        return roofline.seconds(read, 2.0 * elements * done.decode_tokens) / done.decode_seconds

    @property
    def _embedding_only(self) -> nn.Parameter | None:
        """An input embedding that is not the head too: of it, decoding reads a few rows."""
        embedding = self.model.get_input_embeddings().weight
        return None if embedding is self.head.linear.weight else embedding

    # Inside

    @contextmanager
    def _shifted(self, gear: Gear) -> Iterator[None]:
        self._owner.take(self)
        try:
            yield from self._in_gear(gear)
        finally:
            self._owner.leave()

    def _in_gear(self, gear: Gear) -> Iterator[None]:
        before = self.gear
        if gear != before:
            began = time.perf_counter()
            self._shift(gear)
            self.shift_seconds += time.perf_counter() - began
        self.gear = gear
        try:
            yield
        finally:
            self.gear = before

    def _shift(self, gear: Gear) -> None:
        require_attention(self.model)
        self._follow()
        if gear == "training" and self.config.free_cache_while_training:
            self._give_back()
        if gear == "generation":
            self._prepack()

    def _follow(self) -> None:
        """Notice what was done to the weights: moved, written, an adapter switched."""
        if self._where() != self._home:  # moved, or in another precision
            self._give_back()
            self._home = self._where()
        restored = self.runner.weights.restore() if self.runner.weights else 0
        if self._addresses != (addresses := self._found_at()):
            self._addresses = addresses
            if self._scheduler is not None:
                self._scheduler.decoder.forget()
        if restored or self._signs() != self._seen:
            self.weights_changed()

    def _prepack(self) -> None:
        if self.runner.weights and self.config.prepack_weights:
            self.runner.weights.prepack(
                self.runner.kernels, self.weights_version, self.config.max_num_seqs
            )

    def _give_back(self) -> None:
        """Everything that the generation gear holds beside the weights."""
        if self._scheduler is not None and not self._scheduler.idle:
            raise GearshiftError("Requests are running; let them end, or abort them.")
        self._scheduler = None
        if self.runner.weights:
            self.runner.weights.drop_prepacked()
        self.runner.kernels = kernels_of(self.model)

    def _where(self) -> tuple[torch.device, torch.dtype]:
        return self.device, self.model.dtype

    def _signs(self) -> tuple[object, ...]:
        """Differs after every in-place write to a parameter (but through `.data`), whoever does it,
        and after an adapter is switched, scaled or merged.
        """
        written = sum(p._version for p in self._parameters)
        return written, *map(switched, self._adapted)

    def _found_at(self) -> list[int]:
        """Where the parameters lie; recorded steps read them there."""
        self._parameters = list(self.model.parameters())
        self._adapted = [layer for _, layer in adapted_layers(self.model)]
        return [p.data_ptr() for p in self._parameters]

    def _require(self, gear: Gear, what: str) -> None:
        self._owner.check(self)
        if self.gear != gear:
            manager = "generating" if gear == "generation" else "training"
            raise GearshiftError(
                f"{what} needs the {gear} gear; call it inside `with engine.{manager}()`."
            )

    def _add(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        request_ids: Sequence[int],
    ) -> list[list[requests.Sequence]]:
        self._require("generation", "Sampling")
        if not len(prompts) == len(params) == len(request_ids):
            raise ConfigError(
                f"{len(prompts)} prompts have {len(params)} sampling parameters and "
                f"{len(request_ids)} request ids; give as many of each."
            )
        tokens = [requests.checked_prompt(i, p, self.vocabulary) for i, p in enumerate(prompts)]
        request_ids = [requests.checked_id(request) for request in request_ids]
        for i, (prompt, own) in enumerate(zip(tokens, params, strict=True)):
            requests.check_params(own, self.vocabulary)
            self._check_room(i, len(prompt), own.max_new_tokens)
        groups = [
            [
                requests.Sequence(
                    prompt,
                    own,
                    request_id,
                    sample,
                    self.seed if own.seed is None else own.seed,
                    self.end_tokens | frozenset(own.stop_token_ids),
                )
                for sample in range(own.n)
            ]
            for prompt, own, request_id in zip(tokens, params, request_ids, strict=True)
        ]
        self._follow()
        self._prepack()
        scheduler = self._scheduler or self._new_scheduler()
        self._scheduler = scheduler
        self._make_room(scheduler, groups)
        for group in groups:
            scheduler.add(group)
        return groups

    def _new_scheduler(self) -> Scheduler:
        decoder = Decoder(self.runner, self.runner.kernels, KVCache(), self.max_length)
        return Scheduler(
            decoder.cache,
            decoder,
            partial(decode, self.tokenizer),
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
            self.config.decode_steps_per_sync or (1 if self.device.type == "cpu" else 8),
            self.device,
            self._timing,
        )

    def _check_room(self, index: int, length: int, new: int) -> None:
        if length == 0:
            raise CapacityError(f"Prompt {index} is empty; give at least one token.")
        limits = {
            "the limit": self.max_length,
            "the cache, engine.kv_cache_tokens": self._cache_limit,
        }
        for name, limit in limits.items():
            if limit is not None and length + new > limit:
                raise CapacityError(
                    f"Prompt {index} has {length} tokens, and with max_new_tokens={new} passes "
                    f"{name} of {limit}; shorten the prompt or lower max_new_tokens."
                )

    @property
    def _cache_limit(self) -> int | None:
        """Tokens in the blocks that the configured cache has."""
        tokens = self.config.kv_cache_tokens
        return None if tokens is None else tokens // BLOCK * BLOCK

    def _make_room(self, scheduler: Scheduler, groups: list[list[requests.Sequence]]) -> None:
        if self._cache_limit is not None:
            scheduler.cache.grow(self._cache_limit // BLOCK)
            return
        live = len(scheduler.live) + sum(len(group) for group in (*scheduler.waiting, *groups))
        longest = max((len(g[0].prompt) + g[0].params.max_new_tokens for g in groups), default=0)
        scheduler.cache.grow(min(live, self.config.max_num_seqs) * -(-longest // BLOCK))

    def _probe(self, runner: ModelRunner, tokens: list[list[int]]) -> list[Tensor]:
        """See `models.check`: a decoder of its own computes it, so that nothing is left behind."""
        decoder = Decoder(runner, kernels_of(self.model), KVCache(), self.max_length)
        return decode_given(decoder, tokens)

    def _check_limit(self) -> None:
        limit = self.runner.limit
        if limit and self.max_length > limit.tokens:
            raise ModelError(
                f"{named(self.model)} is right up to {limit.tokens} tokens only ({limit.why}); "
                f"set engine.max_length={limit.tokens} or less."
            )
