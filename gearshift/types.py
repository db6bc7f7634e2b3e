"""The records that rooms hand to each other. Nothing here computes more than an index.

Legend: T packed tokens, N sequences, M scored tokens (where the loss mask is 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from gearshift.errors import ConfigError

FinishReason = Literal["stop", "length", "abort"]
Message = dict[str, Any]
"""One chat message: `{"role": "user", "content": "..."}`, and what else chat templates read of it
(`tool_calls`, `reasoning_content`, ...)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample completions. Lists, and for `logit_bias` a mapping, become tuples.

    Raises `ConfigError` for values of another type and for those that no distribution has.
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
    """A completion that reaches it ends with finish reason `length`."""
    stop: tuple[str, ...] = ()
    """Strings, or one string, that end a completion (kept in it); the model's end tokens always
    do."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a completion (kept in it)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the completion has are divided by it where positive and
    multiplied where negative (Keskar et al. 2019); 1 leaves them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that are never completed."""
    seed: int | None = None
    """Seed of these requests; None takes the engine's."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        pairs = [_items("logit_bias", pair) for pair in _items("logit_bias", bias)]
        if any(len(pair) != 2 for pair in pairs):
            raise _wrong("logit_bias", self.logit_bias, "hold pairs of a token and a number")
        given: dict[str, Any] = {
            **{name: _whole(name, getattr(self, name)) for name in _WHOLE},
            **{name: _finite(name, getattr(self, name)) for name in _FINITE},
            "seed": None if self.seed is None else _whole("seed", self.seed),
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
            ("logit_bias", most <= 1e9, "add at most 1e9 to a logit"),
            ("logit_bias", len(biased) == len(self.logit_bias), "name each token once"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "be 0 (all) or more"),
            ("min_p", 0 <= self.min_p < 1, "lie in [0, 1)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "lie in [0, 2^63)"),
            ("stop", all(isinstance(s, str) and s for s in stop), "hold strings, none empty"),
            ("bad_words", all(self.bad_words), "hold no empty run"),
        ):
            if not ok:
                raise _wrong(name, getattr(self, name), must)


_WHOLE = ("n", "top_k", "max_new_tokens")
_FINITE = ("temperature", "top_p", "min_p", "repetition_penalty")


def _wrong(name: str, value: object, must: str) -> ConfigError:
    return ConfigError(f"sampling {name} is {value!r:.80}; it must {must}.")


def _whole(name: str, value: Any) -> int:
    """A whole number of whatever type; True is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _wrong(name, value, "be a whole number")
    return int(value)


def _finite(name: str, value: Any) -> float:
    """A finite number of whatever type; True is none."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise _wrong(name, value, "be a finite number")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """The values of a list of whatever type; a string is none, None is an empty one."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable | None):
        raise _wrong(name, value, "be a list")
    return () if value is None else tuple(value)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(_whole(name, token) for token in _items(name, value))
    if any(token < 0 for token in ids):
        raise _wrong(name, ids, "hold token ids, 0 or more")
    return ids


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine wrote for one prompt."""

    token_ids: list[int]
    """The sampled tokens, the end token included when `finish_reason` is `stop`."""
    logprobs: list[float]
    """log p(token) in nats under softmax(logits / temperature), untouched by truncation (top-k,
    top-p, min-p), penalty, bias and bad words: the policy that training scores and that importance
    ratios are about. Greedy: under softmax(logits)."""
    drawn_logprobs: list[float]
    """log p(token) under the distribution that the token was drawn from, all of that applied; what
    an importance ratio against the sampler itself needs. Equal to `logprobs` where nothing of it
    is asked for."""
    finish_reason: FinishReason
    weights_version: int
    """Which weights wrote it; see `HybridEngine.weights_changed`."""


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
    """A turn's reward stands at the turn's last policy token."""
    group_id: int
    """Episodes that started from the same prompt share it."""
    prompt_length: int
    """Tokens before the first policy token; a group shares them."""
    finish_reason: FinishReason
    """Of the last completion: `length` marks an episode that was cut short."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the environment said of the episode, `prompt` and `completion` texts included."""
    rewarded: tuple[int, ...] | None = None
    """Indices of the tokens at which a reward was given, one of 0 too; None: the last of each turn.
    """

    @property
    def reward(self) -> float:
        """The undiscounted return of the episode."""
        return sum(self.rewards)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Many sequences end to end, with no padding. The only batch type of training.

    A sequence may continue another one, its *parent*: it then attends to the parent's tokens too,
    and its positions go on from them. So the prompt of a group is stored, computed and
    differentiated once:

        input_ids     p p p | a a | b b b | c c        prompt, then its three completions
        position_ids  0 1 2 | 3 4 | 3 4 5 | 3 4
        cu_seqlens    0 3 5 8 10
        parents       -1 0 0 0
        loss_mask     0 0 0 | 1 1 | 1 1 1 | 1 1

    A token with mask 1 is predicted from the hidden state before it: the token to its left, or, at
    the start of a sequence with a parent, the parent's last token.
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64."""
    cu_seqlens: Tensor
    """[N+1] int64, on the CPU: where each sequence starts, then T."""
    parents: Tensor
    """[N] int64, on the CPU: the index of the sequence that this one continues, or -1."""
    loss_mask: Tensor
    """[T] bool: the scored tokens, M of them."""
    loss_weights: Tensor | None = None
    """[T] float32: what each scored token counts for in the loss; made over the whole batch, so
    that the gradient does not depend on how the batch is split.
    """
    advantages: Tensor | None = None
    """[T] float32."""
    returns: Tensor | None = None
    """[T] float32: the target of the value model."""
    old_values: Tensor | None = None
    """[T] float32: what the value model said before the first update on this batch."""
    old_logprobs: Tensor | None = None
    """[T] float32: under the policy before the first update on this batch."""
    ref_logprobs: Tensor | None = None
    """[T] float32: under the reference policy."""
    sampler_logprobs: Tensor | None = None
    """[T] float32: as the generation gear reported them when it sampled."""

    def __len__(self) -> int:
        """T, the number of tokens to compute."""
        return int(self.input_ids.shape[0])

    @property
    def predictors(self) -> Tensor:
        """[M] int64: for each scored token the index of the hidden state that predicts it.

        Raises ValueError where a scored token opens a sequence without a parent: nothing predicts
        it.
        """
        previous = torch.arange(-1, len(self) - 1)
        starts = self.cu_seqlens[:-1]
        parents_end = torch.where(
            self.parents >= 0, self.cu_seqlens[self.parents.clamp(min=0) + 1] - 1, -1
        )
        previous[starts] = parents_end
        rows = previous.to(self.loss_mask.device)[self.loss_mask]
        if bool((rows < 0).any()):
            raise ValueError("A scored token opens a sequence that has no parent.")
        return rows

    @property
    def targets(self) -> Tensor:
        """[M] int64: the scored tokens themselves."""
        return self.input_ids[self.loss_mask]

    @property
    def counts(self) -> Tensor:
        """[N] int64, on the CPU: scored tokens in each sequence (0 for a shared prompt)."""
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self.loss_mask.cpu().cumsum(0)])
        return ends[self.cu_seqlens[1:]] - ends[self.cu_seqlens[:-1]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, those that it continues included."""
        ends: list[int] = []
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()
        for length, parent in zip(lengths, self.parents.tolist(), strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        return max(ends, default=0)

    def scored(self, name: str) -> Tensor:
        """[M]: the per-token field `name` at the scored tokens. Raises ValueError if not set."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"This batch has no {name}.")
        return value[self.loss_mask]

    def with_scored(self, **values_M: Tensor) -> PackedBatch:
        """A copy whose per-token fields hold these [M] values at the scored tokens, 0 elsewhere."""
        spread = {}
        for name, value in values_M.items():
            spread[name] = torch.zeros(len(self), dtype=torch.float32, device=self.input_ids.device)
            spread[name][self.loss_mask] = value.detach().float()
        return replace(self, **spread)

    def unscored(self, left_out_M: Tensor) -> PackedBatch:
        """A copy in which these of the scored tokens ([M] bool) are not scored."""
        mask = self.loss_mask.clone()
        mask[self.loss_mask] = ~left_out_M
        return replace(self, loss_mask=mask)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its token tensors on `device`; the layout stays on the CPU."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if f.name not in ("cu_seqlens", "parents") and getattr(self, f.name) is not None
        }
        return replace(self, **moved)

    @staticmethod
    def join(batches: Sequence[PackedBatch]) -> PackedBatch:
        """The batches end to end as one; all must have the same fields set."""
        tokens = torch.tensor([0, *(len(b) for b in batches)]).cumsum(0)
        sequences = torch.tensor([0, *(len(b.parents) for b in batches)]).cumsum(0)
        joined = {
            f.name: torch.cat([getattr(b, f.name) for b in batches])
            for f in fields(PackedBatch)
            if f.name not in ("cu_seqlens", "parents") and getattr(batches[0], f.name) is not None
        }
        starts = [b.cu_seqlens[:-1] + t for b, t in zip(batches, tokens, strict=False)]
        parents = [
            torch.where(b.parents >= 0, b.parents + n, -1)
            for b, n in zip(batches, sequences, strict=False)
        ]
        return PackedBatch(
            **joined, cu_seqlens=torch.cat([*starts, tokens[-1:]]), parents=torch.cat(parents)
        )

    def trees(self) -> list[tuple[int, int]]:
        """Runs of sequences [first, last) that attend to none outside: a lone one, or a group."""
        roots = [i for i, parent in enumerate(self.parents.tolist()) if parent < 0]
        return list(zip(roots, [*roots[1:], len(self.parents)], strict=True))

    def slice(self, first: int, last: int) -> PackedBatch:
        """Sequences [first, last) as a batch of their own; they must be whole trees."""
        start, end = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        cut = {
            f.name: getattr(self, f.name)[start:end]
            for f in fields(self)
            if f.name not in ("cu_seqlens", "parents") and getattr(self, f.name) is not None
        }
        parents = self.parents[first:last]
        return replace(
            self,
            **cut,
            cu_seqlens=self.cu_seqlens[first : last + 1] - start,
            parents=torch.where(parents >= 0, parents - first, parents),
        )

    def keep(self, wanted_T: Tensor) -> PackedBatch:
        """The sequences that hold a wanted token (`wanted_T` [T] bool), and those that they
        continue; the first tree if no token is wanted.
        """
        lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        parents = self.parents.tolist()
        kept = [bool(part.any()) for part in wanted_T.split(lengths.tolist())]
        for i in reversed(range(len(kept))):  # a parent comes before its children
            if kept[i] and parents[i] >= 0:
                kept[parents[i]] = True
        if not any(kept):
            return self.slice(*self.trees()[0])
        kept_N = torch.tensor(kept)
        kept_T = torch.repeat_interleave(kept_N, lengths).to(wanted_T.device)
        moved_N = kept_N.cumsum(0) - 1
        cut = {
            f.name: getattr(self, f.name)[kept_T]
            for f in fields(self)
            if f.name not in ("cu_seqlens", "parents") and getattr(self, f.name) is not None
        }
        old = self.parents[kept_N]
        return replace(
            self,
            **cut,
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths[kept_N].cumsum(0)]),
            parents=torch.where(old >= 0, moved_N[old.clamp(min=0)], -1),
        )

    def split(self, max_tokens: int) -> Iterator[PackedBatch]:
        """Cut into micro-batches of whole trees, in order: as few as `max_tokens` allows, and of
        about one size. A tree that is longer is a micro-batch alone.
        """
        trees = self.trees()
        if not trees:
            return
        sizes = [int(self.cu_seqlens[end] - self.cu_seqlens[first]) for first, end in trees]

        def cuts(limit: int) -> list[int]:
            """Where each next micro-batch begins."""
            found, tokens = [], 0
            for i, size in enumerate(sizes):
                if tokens + size > limit and tokens:
                    found.append(i)
                    tokens = 0
                tokens += size
            return found

        # The smallest limit that needs no more of them.
        low, high, fewest = 0, max_tokens, len(cuts(max_tokens))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cuts(middle)) == fewest else (middle, high)
        starts = [0, *cuts(high), len(trees)]
        for first, end in pairwise(starts):
            yield self.slice(trees[first][0], trees[end - 1][1])
