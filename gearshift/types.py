"""The records that the parts of the package give to each other. Nothing here computes more than an
index.

The letters of shapes, in the whole package: T packed tokens, M scored tokens (where the loss mask
is 1), N sequences, B rows that decode, S steps, V vocabulary, H hidden, Q query heads, K key heads,
D head size, P positions of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

from gearshift.errors import ConfigError

FinishReason = Literal["stop", "length", "abort"]
Message = dict[str, Any]
"""One chat message: `{"role": "user", "content": "..."}`, and where they exist `name`,
`tool_calls`, `tool_call_id` and `reasoning_content`. The content of a message that only calls tools
may be None.
"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample completions. Lists, and for `logit_bias` a mapping, become tuples.

    Raises `ConfigError` for values of another type or outside their range.
    """

    n: int = 1
    """Completions for each prompt (the size of a group)."""
    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 keeps all."""
    max_new_tokens: int = 128
    """The most tokens of a completion. One that reaches it ends with finish reason `length`."""
    min_new_tokens: int = 0
    """The least tokens of a completion. Before it has them, end tokens and `stop_token_ids` are not
    drawn, and `stop` strings in its text do not end it."""
    stop: tuple[str, ...] = ()
    """Strings, or one string, that end a completion (kept in it); the model's end tokens always
    do."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a completion (kept in it)."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that the prompt or the completion has are divided by it, negative
    ones multiplied (Keskar et al. 2019); 1 leaves them unchanged.
    """
    frequency_penalty: float = 0.0
    """It is subtracted from a token's logit once for each time that the completion has the token,
    as OpenAI's API does. The prompt does not count. 0 leaves the logits unchanged.
    """
    presence_penalty: float = 0.0
    """It is subtracted from the logit of each token that the completion has, however often, as
    OpenAI's API does. The prompt does not count. 0 leaves the logits unchanged.
    """
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that a completion never contains."""
    seed: int | None = None
    """Seed of these requests; None takes the engine's."""
    top_logprobs: int | None = None
    """How many of the most likely tokens a completion reports for each position, with their
    log-probs (see `Completion.top_logprobs`); 0 reports the sampled token's own only. None reports
    none of these, which is fastest.
    """

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        pairs = [_items("logit_bias", pair) for pair in _items("logit_bias", bias)]
        if any(len(pair) != 2 for pair in pairs):
            raise _wrong("logit_bias", self.logit_bias, "hold pairs of a token and a number")
        given: dict[str, Any] = {
            **{name: _whole(name, getattr(self, name)) for name in _WHOLE},
            **{name: _finite(name, getattr(self, name)) for name in _FINITE},
            **{
                name: None if (value := getattr(self, name)) is None else _whole(name, value)
                for name in ("seed", "top_logprobs")
            },
            "stop": stop,
            "stop_token_ids": _tokens("stop_token_ids", self.stop_token_ids),
            "logit_bias": tuple(
                (*_tokens("logit_bias", (t,)), _finite("logit_bias", x)) for t, x in pairs
            ),
            "bad_words": tuple(
                _tokens("bad_words", run) for run in _items("bad_words", self.bad_words)
            ),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        biased, most = dict(self.logit_bias), max((abs(x) for _, x in self.logit_bias), default=0.0)
        greedy = self.temperature == 0
        for name, ok, must in (
            ("n", 1 <= self.n <= 2**16, "lie in [1, 65536]"),
            # Beyond these, logits in float32 would overflow.
            (
                "temperature",
                greedy or 1e-5 <= self.temperature <= 1e5,
                "be 0 (greedy) or in [1e-5, 1e5]",
            ),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "lie in [0.001, 1000]"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "lie in [-2, 2]"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "lie in [-2, 2]"),
            ("logit_bias", most <= 1e9, "add at most 1e9 to a logit"),
            ("logit_bias", len(biased) == len(self.logit_bias), "name each token once"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "be 0 (all) or more"),
            ("min_p", 0 <= self.min_p < 1, "lie in [0, 1)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "lie in [0, max_new_tokens]",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "lie in [0, 2^63)"),
            ("top_logprobs", (self.top_logprobs or 0) >= 0, "be None or 0 or more"),
            ("stop", all(isinstance(s, str) and s for s in stop), "hold strings, none empty"),
            ("bad_words", all(self.bad_words), "hold no empty run"),
        ):
            if not ok:
                raise _wrong(name, getattr(self, name), must)


_WHOLE = ("n", "top_k", "max_new_tokens", "min_new_tokens")
_FINITE = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


def _wrong(name: str, value: object, must: str) -> ConfigError:
    return ConfigError(f"sampling {name} is {value!r:.80}; it must {must}.")


def _whole(name: str, value: Any) -> int:
    """Convert a whole number of any type; True is not a number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _wrong(name, value, "be a whole number")
    return int(value)


def _finite(name: str, value: Any) -> float:
    """Convert a finite number of any type; True is not a number."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise _wrong(name, value, "be a finite number")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """Convert a list of any type to a tuple; a string is not a list, and None is an empty list."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable | None):
        raise _wrong(name, value, "be a list")
    return () if value is None else tuple(value)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(_whole(name, token) for token in _items(name, value))
    if any(token < 0 for token in ids):
        raise _wrong(name, ids, "hold token ids, 0 or more")
    return ids


class TokenScore(NamedTuple):
    """A token's log-prob under softmax(logits), and the most likely tokens at its place. All
    figures come from one row of float32, so the most likely token's figure is exactly the greatest.
    """

    logprob: float
    """In nats, at temperature 1, without truncation, penalties, bias and bad words."""
    top: tuple[tuple[int, float], ...]
    """(token, its log-prob): the most likely first, and of equally likely ones the smallest id."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine wrote for one prompt."""

    token_ids: list[int]
    """The sampled tokens, the end token included when `finish_reason` is `stop`."""
    logprobs: list[float]
    """log p(token) in nats under softmax(logits / temperature), without truncation (top-k, top-p,
    min-p), penalties, bias and bad words. This is the policy that training scores and that
    importance ratios use. Greedy: under softmax(logits).
    """
    drawn_logprobs: list[float]
    """log p(token) under the distribution that the token was drawn from, with truncation,
    penalties, bias, bad words, and without end tokens before `min_new_tokens`. An importance ratio
    against the sampler itself needs it. It equals `logprobs` if the request uses none of these.
    """
    finish_reason: FinishReason
    weights_versions: list[int]
    """The version of the weights that sampled each token; see `Engine.weights_changed`."""
    raw_logprobs: list[float] = field(default_factory=list)
    """log p(token) in nats under softmax(logits), whatever the request's temperature; see
    `TokenScore`. Empty unless `SamplingParams.top_logprobs` asks for it.
    """
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """For each token, the most likely tokens at its place with their log-probs under the same
    distribution: `SamplingParams.top_logprobs` of them, or the whole vocabulary if that is smaller.
    Empty unless asked for.
    """
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens whose keys were in the cache when the request was admitted, so that they were
    not computed for it. This depends on earlier requests; what is sampled does not.
    """


@dataclass(frozen=True, slots=True)
class EpisodeInfo:
    """The texts of an episode, and what its environment reports about it."""

    messages: list[Message] = field(default_factory=list)
    """The whole conversation; the policy's last answer is its end."""
    completion: str = ""
    """The policy's last answer."""
    row: Any = None
    """The environment's own name for the task that it gave; None where it gave none."""
    success: bool = False
    """Whether the environment says that the task is solved."""
    gold: Any = None
    """A right answer, where the environment names one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further figures of the episode, each a finite number."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What reward functions get by name: everything that the environment reports, so the columns of
    its data row, and `row`, `success`, `gold` and `metrics` as it gives them."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode as the policy saw it, token in, token out.

    Example, two turns (the environment's words have mask 0):

        token_ids    user user | yes stop | user user | no  stop
        loss_mask    0    0    | 1   1    | 0    0    | 1   1
        logprobs     0    0    | -.1 -.2  | 0    0    | -.7 -.1
        rewards      0    0    | 0   0.5  | 0    0    | 0   1.0
    """

    token_ids: list[int]
    loss_mask: list[int]
    """1 where the policy wrote the token."""
    logprobs: list[float]
    """Behaviour log-probs (see `Completion.logprobs`); 0 where the mask is 0."""
    rewards: list[float]
    """A turn's reward is at the turn's last policy token."""
    group_id: int
    """Episodes that started from the same prompt share it."""
    prompt_length: int
    """Tokens before the first policy token; a group shares them."""
    finish_reason: FinishReason
    """Why the last completion ended: `length` marks an episode that was cut short."""
    info: EpisodeInfo = field(default_factory=EpisodeInfo)
    """The texts of the episode, and what its environment reports."""
    rewarded: tuple[int, ...] | None = None
    """Indices of the tokens at which a reward was given, even a reward of 0. None: the last token
    of each turn.
    """
    weights_versions: list[int] = field(default_factory=list)
    """The version of the weights that sampled each token; -1 where the mask is 0. Empty where no
    engine sampled the tokens."""

    @property
    def reward(self) -> float:
        """The undiscounted return of the episode."""
        return sum(self.rewards)
