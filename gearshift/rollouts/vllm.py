"""Completions from vLLM servers over HTTP: token ids go in and out, and vLLM is never imported.
This file knows no engine: the caller pushes the weights, and says what ends a completion.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from gearshift.errors import CapacityError, ConfigError, ServerError
from gearshift.rewards.http_client import NoAnswerError, bearer_key, http_host, post
from gearshift.rollouts.episode import group_of
from gearshift.runtime.config import RECORDED, Config, Neutral
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import echo
from gearshift.runtime.urls import Endpoint, check_no_secret, redact_urls
from gearshift.runtime.worker_threads import WorkerThreads
from gearshift.types import Completion, SamplingParams

T = TypeVar("T")
KEY = "GEARSHIFT_VLLM_KEY"
"""The environment variable with the key of the servers; it is sent to them only."""
_TRIES = 3
_PAUSE = 0.5
"""Seconds before the second try; they double with each further one."""


class GenerationConfig(Config):
    """What samples completions, in training and in evaluation."""

    backend: Literal["engine", "vllm"] = "engine"
    """The program that samples. `engine` samples in this process, on the weights that are trained.
    `vllm` asks servers, which get the weights before each rollout. Their log-probabilities are not
    quite those of training, so `rl.importance` is then `token_truncate`, unless the recipe sets
    it."""
    servers: Neutral[tuple[str, ...]] = ()
    """The addresses of the vLLM servers, such as http://127.0.0.1:8000. Each group of completions
    goes to one of them. If a server dies, the others take its groups. The servers must read
    `run.dir` at the same path, because the weights go through a folder there. The key that they ask
    for is in the environment variable GEARSHIFT_VLLM_KEY."""
    timeout: Neutral[float] = Field(default=600.0, gt=0)
    """How many seconds a server has for one completion, or for reading the weights."""
    tolerance: Neutral[float | None] = Field(default=None, gt=0)
    """The mean difference, in nats a token, that the log-probabilities of a server and of the
    trainer may have after a push of weights. A larger one stops the run. null is 0.001 for weights
    in float32, and 0.05 for others."""
    sleep: Neutral[bool] = False
    """Whether the servers free their GPUs while the model trains (vLLM's sleep mode, level 1). It
    is for servers on the same GPUs, which run with --enable-sleep-mode."""

    @field_validator("servers")
    @classmethod
    def _are_addresses(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for url in servers:
            check_no_secret(url)
            try:
                http_host(url, url)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if len(set(servers)) < len(servers):
            raise ValueError("an address stands twice; name each server once.")
        return servers

    @model_validator(mode="after")
    def _has_servers(self, info: ValidationInfo) -> Self:
        if self.backend == "vllm" and not self.servers and info.context != RECORDED:
            raise ValueError(
                "backend=vllm needs servers; set generation.servers=[http://HOST:PORT]."
            )
        unread = [k for k in ("servers", "timeout", "tolerance", "sleep") if k in _changed(self)]
        if self.backend == "engine" and unread:
            raise ValueError(
                f"backend=engine does not use {unread[0]}; set backend=vllm, or leave it out."
            )
        return self


def _changed(config: GenerationConfig) -> list[str]:
    fields = GenerationConfig.model_fields
    return [key for key, field in fields.items() if getattr(config, key) != field.default]


class VLLMServer:
    """One server."""

    def __init__(self, url: str, timeout: float) -> None:
        self._key, self._url, self._timeout = bearer_key(None, KEY), url.rstrip("/"), timeout
        self.name = redact_urls(self._url)
        self.lost = ""
        """Why nothing is asked of it until the next push; empty while it answers."""

    def post(self, path: str, body: Any, read: Callable[[Any], T | None], tries: int = _TRIES) -> T:
        """What `read` finds in the answer. Raises `NoAnswerError`, or `ConfigError` for a request
        that the server refuses.
        """
        address = Endpoint.of(self._url + path, self._key)
        return post(address, body, read, self._timeout, tries, _PAUSE)

    def command(self, path: str, body: Any = None) -> None:
        """A command, whose answer says nothing."""
        self.post(path, body or {}, lambda answer: True)

    def reload(self, folder: Path) -> None:
        """Read the weights of a saved model's folder, and forget what was computed with others."""
        arguments = {"weights_path": str(folder)}
        self.command("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self.post("/reset_prefix_cache", {}, _is_done)


class VLLM:
    """vLLM servers as a `GenerationBackend`."""

    exact = False

    def __init__(
        self,
        config: GenerationConfig,
        end_tokens: AbstractSet[int],
        max_length: int,
        seed: int = 0,
        at_once: int = 64,
    ) -> None:
        """`end_tokens` end a completion, `max_length` is the longest prompt with its completion,
        and `at_once` requests are on their way at the same time.
        """
        self.servers = [VLLMServer(url, config.timeout) for url in config.servers]
        self.version = 0
        self._ends, self._max_length, self._seed = frozenset(end_tokens), max_length, seed
        self._threads = WorkerThreads(at_once)
        weakref.finalize(self, self._threads.close)
        self._stats = dict.fromkeys(_STATS, 0.0)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        """One completion; see `GenerationBackend`. If its server does not answer, the next one is
        asked. Raises `ServerError` if none is left.
        """
        if len(token_ids) + params.max_new_tokens > self._max_length or not token_ids:
            raise CapacityError(
                f"The prompt has {len(token_ids)} tokens, and the model takes {self._max_length} "
                f"with {params.max_new_tokens} new ones; shorten it."
            )
        seed = self._seed if params.seed is None else params.seed
        body = self.request(token_ids, params, named_seed(seed, f"{request_id}/{sample}"))
        first = group_of(request_id) % len(self.servers)
        for server in self.servers[first:] + self.servers[:first]:
            if not server.lost:
                try:
                    return await self.ask(server, body, params)
                except NoAnswerError as error:
                    self.lose(server, str(error))
        self.require_one()
        raise ServerError(f"No vLLM server gave request {request_id} an answer; this is a bug.")

    def request(
        self, token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> dict[str, Any]:
        """The body of a request. It sets everything that a server would otherwise take from the
        model's own generation config. Raises `ConfigError` for what vLLM cannot do with tokens.
        """
        if params.bad_words:
            raise ConfigError("vLLM takes bad_words as texts, not as tokens; leave bad_words out.")
        if params.top_logprobs is not None:
            raise ConfigError("vLLM gives no top_logprobs here; leave top_logprobs out.")
        return {
            "prompt": list(token_ids),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            "logit_bias": {str(token): bias for token, bias in params.logit_bias} or None,
            "min_tokens": params.min_new_tokens,
            "seed": seed % 2**63,
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self._ends | set(params.stop_token_ids)),
            "ignore_eos": True,  # the tokens above end a completion, and no others
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }

    async def ask(
        self, server: VLLMServer, body: dict[str, Any], params: SamplingParams
    ) -> Completion:
        """The completion of a request's body from one server."""
        read = partial(
            _completion, name=server.name, params=params, ends=self._ends, version=self.version
        )
        began = time.perf_counter()
        call = self._threads.submit(partial(server.post, "/v1/completions", body, read))
        completion = await asyncio.wrap_future(call)
        self._stats["completions"] += 1
        self._stats["completion_seconds"] += time.perf_counter() - began
        return completion

    async def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """Every server reads the folder. One that does not answer is asked for nothing until the
        next push. Raises `ServerError` if none is left.
        """
        self.push(weights, version, self.servers)

    def push(
        self,
        weights: Path | Mapping[str, Tensor],
        version: int,
        servers: Sequence[VLLMServer],
    ) -> None:
        """The same, for some of the servers."""
        if not isinstance(weights, Path):
            raise ConfigError("vLLM servers read a saved model's folder; give its path.")
        began = time.perf_counter()
        for server in servers:
            server.lost = ""
        self.command_all(servers, lambda server: server.reload(weights.resolve()))
        self.version = version
        self._stats["push_seconds"] += time.perf_counter() - began

    def command_all(self, servers: Sequence[VLLMServer], do: Callable[[VLLMServer], None]) -> None:
        """Do it with all these servers at the same time; who does not answer is lost."""
        calls = [(server, self._threads.submit(partial(do, server))) for server in servers]
        for server, call in calls:
            try:
                call.result()
            except NoAnswerError as error:
                self.lose(server, str(error))
        self.require_one()

    def generating(self) -> AbstractContextManager[Any]:
        """See `GenerationBackend`."""
        return nullcontext()

    def stats(self) -> dict[str, float]:
        """The figures of the work since the last call, by name."""
        figures, self._stats = self._stats, dict.fromkeys(_STATS, 0.0)
        return figures

    def lose(self, server: VLLMServer, why: str) -> None:
        """Ask this server for nothing until the next push."""
        if not server.lost:
            server.lost = why
            self._stats["servers_lost"] += 1
            echo(f"generation: {why}; it is asked again after the next push of weights")

    def require_one(self) -> None:
        """Raises `ServerError` if no server is left."""
        if all(server.lost for server in self.servers):
            whys = "; ".join(server.lost for server in self.servers)
            raise ServerError(
                f"No vLLM server answers ({whys}); start one, and the same command goes on."
            )


def _is_done(answer: Any) -> bool | None:
    """Whether the cache was reset; None while it is in use, so that it is asked again."""
    return None if isinstance(answer, dict) and answer.get("success") is False else True


_STATS = ("completions", "completion_seconds", "push_seconds", "servers_lost")


def _completion(
    answer: Any, name: str, params: SamplingParams, ends: AbstractSet[int], version: int
) -> Completion | None:
    """The completion in an answer; None for one that the server broke off, which is asked for
    again. Raises `ServerError` for one that cannot be whole.
    """
    choice = answer["choices"][0]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        return None
    tokens = [int(token) for token in choice["token_ids"]]
    drawn = [math.nan if x is None else float(x) for x in choice["logprobs"]["token_logprobs"]]
    ended = bool(tokens) and tokens[-1] in ends | set(params.stop_token_ids)
    wrong = ""
    if len(tokens) != len(drawn):
        wrong = f"{len(tokens)} tokens with {len(drawn)} log-probabilities"
    elif not all(math.isfinite(x) for x in drawn):
        wrong = "a log-probability that is no number"
    elif reason == "length" and len(tokens) != params.max_new_tokens:
        wrong = f"{len(tokens)} tokens where the limit of {params.max_new_tokens} ended them"
    elif not tokens or (reason == "stop" and not (ended or params.stop)):
        wrong = "a completion that ends without an end token"
    if wrong:
        raise ServerError(
            f"{name} gave {wrong}; look at its context length and its version of vLLM."
        )
    plain = params.top_p == 1 and not params.top_k and not params.min_p
    plain = plain and params.repetition_penalty == 1 and not params.logit_bias
    plain = plain and not params.frequency_penalty and not params.presence_penalty
    plain = plain and not params.min_new_tokens
    whole = drawn if plain or params.temperature == 0 else [math.nan] * len(drawn)
    return Completion(tokens, whole, drawn, reason, [version] * len(tokens))
