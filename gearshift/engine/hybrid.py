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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.batch import PackedBatch
from gearshift.data.chat import end_token_ids
from gearshift.data.text import has_stop
from gearshift.engine.block_cache import KVCache
from gearshift.engine.cache_size import cache_capacity
from gearshift.engine.cached_forward import CachedForward
from gearshift.engine.config import EngineConfig
from gearshift.engine.decoder import Decoder
from gearshift.engine.loop import EngineLoop, Stream
from gearshift.engine.owner import owner_of
from gearshift.engine.probe import blocks_of, decode_given, score_given
from gearshift.engine.scheduler import Group, Scheduler, blocks_for
from gearshift.engine.sequence import SamplingLimits
from gearshift.engine.stats import GenerationStats
from gearshift.engine.weights import WeightsWatch, copy_weights, require_whole
from gearshift.errors import ConfigError, GearshiftError, ModelError
from gearshift.kernels.dispatch import kernels_of
from gearshift.kernels.specs import BLOCK
from gearshift.models.attention import ATTENTION, require_attention
from gearshift.models.describe import head_of
from gearshift.models.exact import context_length, named
from gearshift.models.load import end_tokens
from gearshift.models.logprobs import TokenScores
from gearshift.models.runner import ModelRunner
from gearshift.models.vocabulary import check_vocabulary
from gearshift.runtime.sharded_parameter import own_rows
from gearshift.runtime.terminal import counted
from gearshift.types import Completion, SamplingParams, TokenScore

Gear = Literal["training", "generation"]


class Engine:
    """One causal language model, trained and sampled in place. See the module's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        seed: int = 0,
        generates: bool = True,
    ) -> None:
        """Fuse the weights of a described architecture, check the head and the vocabulary. If
        `generates` is false, as where servers sample, no whole copy stays beside a model that is
        split over the ranks. Raises `ModelError`, and `ConfigError` for a seed of more than 64
        bits.
        """
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"The seed {seed} has more than 64 bits; take a smaller one.")
        self.model, self.tokenizer = model, tokenizer
        self._owner = owner_of(model)
        self._owner.check(self)
        self.config, self.seed = config or EngineConfig(), seed
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        model.eval()
        self.head = head_of(model)
        self.vocabulary = check_vocabulary(model, tokenizer)
        self.end_tokens = end_tokens(model, tokenizer) | end_token_ids(tokenizer)
        self.weights_version = 0
        self.gear: Gear | None = None
        self._stats = GenerationStats()
        require_whole(model)
        again = bool(self.config.recompute)
        self.runner = ModelRunner(model, recompute=again, decode=self._probe, keep_whole=generates)
        self._check_limit()
        self._watch = WeightsWatch(model)
        self._placement = self._watch.placement
        self._capacity: int | None = None
        self.loop = EngineLoop(self)
        """The loop that runs all requests. Rollouts and servers await its completions; the
        synchronous calls use it too.
        """

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.runner.kept.device

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        longest = context_length(self.model.config) or 2**20
        return min(longest, self.config.max_length or longest)

    @contextmanager
    def generating(self) -> Iterator[Engine]:
        """Enter the generation gear: no gradients, no dropout. Contexts nest; afterwards the
        earlier gear is back.
        """
        with self._shifted("generation"), torch.no_grad():
            yield self

    @contextmanager
    def training(self, dropout: bool = False) -> Iterator[Engine]:
        """Enter the training gear. Dropout is off by default, because reinforcement learning needs
        it: the policy that is scored must be the policy that sampled.
        """
        with self._shifted("training"), torch.enable_grad():
            was = self.model.training
            self.runner.train(dropout)
            try:
                yield self
            finally:
                self.runner.train(was)

    def weights_changed(self) -> None:
        """Declare that the parameters were written: a new version begins, and the cache forgets the
        old one. Where a split copy is trained, its weights are written into the model first, and
        all ranks call this. Raises `GearshiftError` while requests are on their way.
        """
        self._owner.check(self)
        self._check_idle()
        self.runner.weights_changed()
        self._begin_version()

    def _check_idle(self) -> None:
        self.loop.pause()
        if not self.loop.idle:
            raise GearshiftError(
                "The weights changed while requests were running; let them end, or abort them."
            )

    def _begin_version(self) -> None:
        """The model's own parameters were written."""
        self._check_idle()
        self.loop.reset_prefix_cache()
        self._watch.accept()
        self.weights_version += 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order; `params` may be one for all
        or one for each. Other requests, such as streams, continue meanwhile.

        What is sampled is a function of (seed, request id, sample, position) and the weights only:
        not of the other prompts, nor of how many rows run together. Request ids default to 0, 1,
        ...
        Raises `CapacityError` for an empty prompt, or one that leaves no room for `max_new_tokens`;
        `DataError` and `ConfigError` for tokens that are not in the vocabulary.
        """
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if not all(isinstance(one, SamplingParams) for one in each):
            raise ConfigError("params is not SamplingParams, or a list of them; make it so.")
        request_ids = range(len(prompts)) if request_ids is None else request_ids
        if not len(prompts) == len(each) == len(request_ids):
            raise ConfigError(
                f"The call gives {counted(len(prompts), 'prompt')}, "
                f"{len(each)} SamplingParams and "
                f"{counted(len(request_ids), 'request id')}; give as many of each."
            )
        return self.loop.complete(zip(prompts, each, request_ids, strict=True))

    def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, request_id: int = 0
    ) -> Stream:
        """The tokens of one completion as they are sampled, the same that `generate` would give.

        The request runs beside others: of other streams, and of `generate`.
        """
        return self.loop.stream(prompt, params, request_id)

    def score(self, token_ids: Sequence[int], top: int = 0) -> list[TokenScore]:
        """The log-prob of each token after the first, given those before it, and the `top` most
        likely tokens at its place: T - 1 scores for T tokens. Requests that run are not disturbed.

        Raises `CapacityError` for a text that is empty or longer than `max_length`; `DataError` for
        tokens that are not in the vocabulary.
        """
        self._require("generation", "score")
        ids = self.limits.scored(token_ids, top)
        if self.loop.idle:
            self.prepare_generation()
        forward = self._own_cache(self.runner, blocks_of([ids]))
        most = self.config.max_num_batched_tokens
        return score_given(forward, ids, top, self.vocabulary, most)

    def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """Copy weights into the model's parameters, from a saved model's folder or from tensors by
        parameter name. Tokens that are sampled from then on have this version.

        Raises `ModelError` for names or shapes that are not the model's, `ConfigError` for a
        version that is not new.
        """
        if version <= self.weights_version:
            raise ConfigError(
                f"The engine's weights have version {self.weights_version}; a new one is greater, "
                f"and not {version}."
            )
        self._owner.check(self)
        if self.loop.idle:
            copy_weights(self.model, weights)
        self._begin_version()
        self.weights_version = version

    def check_owner(self) -> None:
        """Raises `GearshiftError` unless this thread may use the engine."""
        self._owner.check(self)

    def check_generating(self) -> None:
        """The same, and the engine must be in its generation gear."""
        self._require("generation", "Sampling")

    def check_weights(self) -> None:
        """Raises `GearshiftError` if the weights have changed while requests run."""
        if self._watch.written():
            self._begin_version()

    def prepare_generation(self) -> None:
        """Detect changes of the weights, and prepack them."""
        self._follow()
        self._prepack()

    @property
    def limits(self) -> SamplingLimits:
        """The limits of a completion, and what ends it."""
        return SamplingLimits(
            self.vocabulary,
            self.max_length,
            self._cache_limit,
            "kv_cache_tokens" if self.config.kv_cache_tokens else "gpu_memory_utilization",
            self.seed,
            self.end_tokens,
        )

    def new_generation(self, groups: list[Group]) -> tuple[Scheduler, Decoder]:
        """A scheduler and a decoder with an empty cache, in which these groups have room."""
        needed = blocks_for(groups, self.config.max_num_seqs)
        cache = KVCache(cache_capacity(self.model, self.config, self.max_length, needed))
        if self.config.kv_cache_tokens is not None:
            cache.open(cache.capacity)
        forward = CachedForward(self.runner, self.runner.kernels, cache, self.max_length)
        ahead = self.config.decode_steps_per_sync or (1 if self.device.type == "cpu" else 8)
        ends = partial(has_stop, self.tokenizer)
        scheduler = Scheduler(cache, self.config, ahead, ends, self._stats)
        return scheduler, Decoder(forward, self.config)

    def logprobs(
        self, batch: PackedBatch, temperature: float = 1.0, value_head: nn.Module | None = None
    ) -> TokenScores:
        """Log-probs, entropy (and values) of the batch's scored tokens; see
        `ModelRunner.logprobs`.
        """
        self._require("training", "logprobs")
        return self.runner.logprobs(batch, temperature, value_head)

    def memory(self) -> dict[str, int]:
        """Bytes by purpose. `aliased` is part of `weights`, not a copy. Of what is split over the
        ranks this rank's part counts.
        """
        models = {self.runner.kept, self.runner.learner.model}
        parameters = [p for model in models for p in model.parameters()]
        return {
            "weights": sum(own_rows(p).nbytes for p in parameters),
            "gradients": sum(own_rows(p.grad).nbytes for p in parameters if p.grad is not None),
            "aliased": self.runner.weights.bytes() if self.runner.weights else 0,
            "prepacked": self.runner.weights.prepacked_bytes() if self.runner.weights else 0,
            "cache": self.loop.cache_bytes,
            "steps": self.runner.kernels.workspace_bytes(),
        }

    def take_stats(self) -> GenerationStats:
        """The figures of generation since the last call."""
        return self._stats.take()

    def named_stats(self) -> dict[str, float]:
        """The same by name, as metrics have it."""
        return self.take_stats().named(self.model, self.loop.position_bytes)

    @contextmanager
    def _shifted(self, gear: Gear) -> Iterator[None]:
        self._owner.take(self)
        try:
            own = own_rows(next(self.runner.kept.parameters()))
            with torch.cuda.device_of(own):  # streams are this device's
                yield from self._in_gear(gear)
        finally:
            self._owner.leave()

    def _in_gear(self, gear: Gear) -> Iterator[None]:
        before = self.gear
        if gear != before:
            began = time.perf_counter()
            self._shift(gear)
            self._stats.shift_seconds += time.perf_counter() - began
        self.gear = gear
        try:
            yield
        finally:
            self.gear = before

    def _shift(self, gear: Gear) -> None:
        if gear == "generation" and not self.runner.is_whole:
            raise GearshiftError(
                "The model is split over the ranks and each has only a part, so servers sample "
                "(generation.backend); make the engine with generates=True to sample here."
            )
        require_attention(self.model)
        self._follow()
        if gear == "training" and self.config.free_cache_while_training:
            self._give_back()
        if gear == "generation":
            self._prepack()

    def _follow(self) -> None:
        """Detect changes of the weights."""
        if not self.runner.is_whole:
            self._watch.moved()  # it knows the whole weights no more, so that their memory is free
            return
        require_whole(self.model)
        if self._watch.placement != self._placement:
            self._give_back()
            self.runner.kernels = kernels_of(self.model)
            self._placement, self._capacity = self._watch.placement, None
        restored = self.runner.weights.restore() if self.runner.weights else 0
        if self._watch.moved():
            self.loop.forget_captures()
        if restored or self._watch.written():
            self._begin_version()

    def _prepack(self) -> None:
        if self.runner.weights and self.config.prepack_weights:
            self.runner.weights.prepack(
                self.runner.kernels, self.weights_version, self.config.max_num_seqs
            )

    def _give_back(self) -> None:
        """Free everything that the generation gear holds beside the weights."""
        self.loop.release()
        if self.runner.weights:
            self.runner.weights.drop_prepacked()
        self.runner.kernels.free_workspace()

    def _require(self, gear: Gear, what: str) -> None:
        self._owner.check(self)
        if self.gear != gear:
            manager = "generating" if gear == "generation" else "training"
            raise GearshiftError(
                f"{what} needs the {gear} gear; call it inside `with engine.{manager}()`."
            )

    @property
    def _cache_limit(self) -> int | None:
        """The number of tokens in the cache, where the requests do not decide it."""
        if self.config.kv_cache_tokens is None and self.device.type != "cuda":
            return None
        if self._capacity is None:
            self._capacity = cache_capacity(self.model, self.config, self.max_length, 0)
        return self._capacity * BLOCK

    def _probe(self, runner: ModelRunner, tokens: list[list[int]]) -> list[Tensor]:
        """See `models.check`. The check uses a separate cache, so that it leaves nothing behind."""
        return decode_given(self._own_cache(runner, blocks_of(tokens)), tokens)

    def _own_cache(self, runner: ModelRunner, blocks: int) -> CachedForward:
        """A forward with a cache of its own."""
        kernels = kernels_of(self.model)
        return CachedForward(runner, kernels, KVCache(blocks), self.max_length)

    def _check_limit(self) -> None:
        limit = self.runner.limit
        if limit and self.max_length > limit.tokens:
            raise ModelError(
                f"{named(self.model)} is right up to {limit.tokens} tokens only ({limit.why}); "
                f"set engine.max_length={limit.tokens} or less."
            )
