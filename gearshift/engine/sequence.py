"""What the scheduler runs: one unfinished completion, and when it ends; and the checks of a request
before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from numbers import Integral
from operator import index
from typing import Any

from gearshift.errors import CapacityError, ConfigError, DataError, GearshiftError
from gearshift.types import Completion, FinishReason, SamplingParams, TokenScore

HasStop = Callable[[list[int], tuple[str, ...], int], bool]
"""Whether the text of these tokens, after that of the first so many, contains one of the strings.
"""


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion, waiting, live or ended."""

    prompt: list[int]
    params: SamplingParams
    request_id: int
    sample_index: int
    seed: int
    end_tokens: frozenset[int]
    early_params: SamplingParams
    """The parameters of its first `min_new_tokens` tokens, which forbid the end tokens."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    weights_versions: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    """One for each token, if `params.top_logprobs` asks for them."""
    finish_reason: FinishReason | None = None
    error: GearshiftError | None = None
    """The error that ended it, if there was one. Other sequences continue."""
    uniforms: list[float] = field(default_factory=list)
    """One random number for each of its tokens; they are drawn ahead."""
    blocks: list[int] = field(default_factory=list)
    """Its blocks of the cache while it runs."""
    cached_tokens: int | None = None
    """Prompt tokens that were in the cache when it was admitted first; None before that."""
    served: bool = False
    """Whether a service's request; such a one may be paused, and go on with other weights."""

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def params_now(self) -> SamplingParams:
        """The parameters of its next token."""
        early = len(self.token_ids) < self.params.min_new_tokens
        return self.early_params if early else self.params

    @property
    def tokens(self) -> list[int]:
        """Prompt and completion so far."""
        return self.prompt + self.token_ids

    def with_sample(self, sample_index: int) -> Sequence:
        """Another completion of this request, without tokens."""
        return Sequence(
            self.prompt,
            self.params,
            self.request_id,
            sample_index,
            self.seed,
            self.end_tokens,
            self.early_params,
        )

    def append(
        self,
        token: int,
        logprob: float,
        drawn_logprob: float,
        score: TokenScore | None,
        version: int,
        has_stop: HasStop,
    ) -> None:
        """Add a token that weights of this version sampled, and find out whether it is the last."""
        if score is not None:
            self.scores.append(score)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.drawn_logprobs.append(drawn_logprob)
        self.weights_versions.append(version)
        try:
            ends = token in self.end_tokens or (
                bool(self.params.stop)
                and has_stop(self.token_ids, self.params.stop, self.params.min_new_tokens)
            )
        except Exception as error:  # the tokenizer has a method for it
            self.fail(error)
            return
        if ends:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End it here, with the error that its callers get."""
        self.finish_reason = "abort"
        if not isinstance(error, GearshiftError):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            error = GearshiftError(f"Request {self.request_id} failed alone: {reason}.")
        self.error = error

    def has_ended(self) -> bool:
        """Whether its last token was sampled. Raises the error that ended it, if one did."""
        if self.error is not None:
            raise self.error
        return self.finish_reason is not None

    def completion(self) -> Completion:
        """The completion for the caller; a sequence that has not ended counts as aborted."""
        return Completion(
            self.token_ids,
            self.logprobs,
            self.drawn_logprobs,
            self.finish_reason or "abort",
            self.weights_versions,
            [score.logprob for score in self.scores],
            [score.top for score in self.scores],
            self.cached_tokens or 0,
        )


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """The limits of a completion, and what ends it."""

    vocabulary: int
    max_length: int
    """Longest prompt plus completion."""
    cache_tokens: int | None
    """Tokens that the cache holds, if that is known."""
    cache_key: str
    """The engine's key that decides it."""
    seed: int
    """The seed of requests that give none."""
    end_tokens: frozenset[int]

    def sequence(
        self,
        token_ids: Iterable[int],
        params: SamplingParams,
        request_id: int,
        sample_index: int = 0,
        name: str = "The prompt",
    ) -> Sequence:
        """A completion to be sampled; `name` is the prompt's, for errors.

        Raises `CapacityError` for a prompt that is empty or leaves no room for what `params` ask;
        `DataError` and `ConfigError` for tokens that are not in the vocabulary.
        """
        prompt = check_prompt(name, token_ids, self.vocabulary)
        request_id = check_id(request_id)
        ends = self.end_tokens | frozenset(params.stop_token_ids)
        check_params(params, ends, self.vocabulary)
        self._check_room(name, len(prompt), params.max_new_tokens)
        seed = self.seed if params.seed is None else params.seed
        early = self._without_ends(params, ends) if params.min_new_tokens else params
        return Sequence(prompt, params, request_id, sample_index, seed, ends, early)

    def group(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, name: str
    ) -> list[Sequence]:
        """`params.n` completions of one prompt."""
        one = self.sequence(token_ids, params, request_id, 0, name)
        return [one, *(one.with_sample(i) for i in range(1, params.n))]

    def scored(self, token_ids: Iterable[int], top: int) -> list[int]:
        """The token ids of a text to be scored. Raises `CapacityError` for one that is empty or too
        long, `DataError` for tokens that are not in the vocabulary, and `ConfigError` for a `top`
        that is no number of tokens.
        """
        ids = check_prompt("The text", token_ids, self.vocabulary)
        SamplingParams(top_logprobs=top)
        _check_some("The text", len(ids))
        if len(ids) > self.max_length:
            raise CapacityError(
                f"The text has {len(ids)} tokens and passes the limit of {self.max_length}; "
                "shorten it."
            )
        return ids

    def _without_ends(self, params: SamplingParams, ends: frozenset[int]) -> SamplingParams:
        """The parameters, and no end token may be drawn."""
        barred = [(token,) for token in sorted(ends) if token < self.vocabulary]
        return replace(params, bad_words=(*params.bad_words, *barred))

    def _check_room(self, name: str, length: int, new: int) -> None:
        _check_some(name, length)
        limits = {
            "the limit": self.max_length,
            f"the cache, engine.{self.cache_key}": self.cache_tokens,
        }
        for what, limit in limits.items():
            if limit is not None and length + new > limit:
                raise CapacityError(
                    f"{name} has {length} tokens, and with max_new_tokens={new} passes {what} of "
                    f"{limit}; shorten the prompt or lower max_new_tokens."
                )


def _check_some(name: str, length: int) -> None:
    if length == 0:
        raise CapacityError(f"{name} is empty; give at least one token.")


def check_prompt(name: str, prompt: Iterable[int], vocabulary: int) -> list[int]:
    """The prompt's token ids. Raises `DataError` for a value outside the vocabulary."""
    if isinstance(prompt, str | bytes):
        raise DataError(f"{name} is a text; encode it first, a prompt is token ids.")
    if not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
        raise DataError(f"{name} is {prompt!r}; give a list of prompts, each of token ids.")
    ids = list(prompt)
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary:
        return ids
    for token in ids:
        if not _is_token(token, vocabulary):
            raise DataError(
                f"{name} holds {token!r}, which is no token id from 0 to {vocabulary - 1}; "
                "encode it with this model's tokenizer."
            )
    return list(map(index, ids))


def check_params(params: SamplingParams, ends: frozenset[int], vocabulary: int) -> None:
    """Raises `ConfigError` where the parameters name tokens that the vocabulary lacks, or leave
    none to be sampled.
    """
    named = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": tuple(token for token, _ in params.logit_bias),
        "bad_words": tuple(token for run in params.bad_words for token in run),
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocabulary:
                raise ConfigError(
                    f"sampling {name} names token {token}; the vocabulary ends at {vocabulary - 1}."
                )
    barred = {run[-1] for run in params.bad_words}
    if len(barred) == vocabulary:
        raise ConfigError("sampling bad_words ends with every token; leave one to be sampled.")
    if params.min_new_tokens and barred | ends >= set(range(vocabulary)):
        raise ConfigError(
            "sampling min_new_tokens forbids the end tokens, which are all that bad_words leaves; "
            "leave another one to be sampled."
        )


def check_id(request_id: Any) -> int:
    """A request's number. Raises `ConfigError` for one that seeds no samples."""
    if not _is_token(request_id, 2**63):
        raise ConfigError(f"The request id {request_id!r} is no whole number in [0, 2^63).")
    return index(request_id)


def _is_token(value: Any, end: int) -> bool:
    """Whether it is a whole number from 0 to below `end`; one of a tensor is too."""
    if not isinstance(value, Integral):
        try:
            value = index(value)
        except TypeError:
            return False
    return not isinstance(value, bool) and 0 <= value < end
