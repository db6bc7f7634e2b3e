"""Who runs when: requests wait, are admitted to rows of the cache, decode together, and leave when
done.

First form: a row is reserved for a request's greatest length when it is admitted, and a freed row
is refilled at the next step. The loop is `step()`; `HybridEngine` hides it behind `generate` and
`stream`.
Legend: B rows of one forward, S tokens a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.engine.cache import CachedLayout, KVCache, Span
from gearshift.engine.sampler import sample
from gearshift.runtime.seeding import philox_uniform
from gearshift.types import Completion, FinishReason, SamplingParams

Forward = Callable[[Tensor, CachedLayout], Tensor]
"""[B, S] token ids and their layout -> [B, S, H]."""
Logits = Callable[[Tensor], Tensor]
"""[B, H] -> [B, V] float32."""


@dataclass(slots=True, eq=False)
class Sampled:
    """One completion on its way."""

    prompt: list[int]
    request_id: int
    sample_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.token_ids)


@dataclass(slots=True)
class StopRule:
    """When a completion ends: an end token, a stop string, or the longest length."""

    end_tokens: frozenset[int]
    max_new_tokens: int
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def reason(self, sequence: Sampled) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None."""
        if sequence.token_ids[-1] in self.end_tokens:
            return "stop"
        if self.strings and any(s in self.decode(sequence.token_ids) for s in self.strings):
            return "stop"
        return "length" if len(sequence.token_ids) >= self.max_new_tokens else None


class Scheduler:
    """Runs the sequences of one call to their ends, `max_rows` at a time."""

    def __init__(
        self,
        groups: Sequence[Sequence[Sampled]],
        params: SamplingParams,
        stop: StopRule,
        cache: KVCache,
        forward: Forward,
        logits: Logits,
        seed: int,
        prefill_tokens: int,
        device: torch.device,
    ) -> None:
        self.waiting = deque(deque(group) for group in groups)
        self.live: list[Sampled] = []
        self.params, self.stop, self.seed = params, stop, seed
        self.cache, self.forward, self.logits = cache, forward, logits
        self.prefill_tokens, self.device = prefill_tokens, device

    def step(self) -> list[Sampled]:
        """One token for every live sequence, new ones admitted first; returns those that got a
        token.
        """
        decoding = len(self.live)
        hidden = [self._decode(decoding)] if decoding else []
        hidden += self._admit()
        served = list(self.live)
        self._sample(torch.cat(hidden))
        for row in reversed(range(len(self.live))):
            if self.live[row].finish_reason is not None:
                self._free(row)
        return served

    @property
    def done(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.live

    def _decode(self, rows: int) -> Tensor:
        newest = torch.tensor([[s.token_ids[-1]] for s in self.live], device=self.device)
        positions = torch.tensor([[s.length - 1] for s in self.live], device=self.device)
        extent = max(s.length for s in self.live)
        layout = CachedLayout(self.cache, Span(slice(0, rows), positions, extent))
        return self.forward(newest, layout)[:, 0]

    def _admit(self) -> list[Tensor]:
        """Fill free rows from the queue; a group's prompt is computed once and its keys copied."""
        hidden = []
        while self.waiting and len(self.live) < self.cache.rows:
            batch: list[list[Sampled]] = []
            free, longest = self.cache.rows - len(self.live), 0
            while self.waiting and free:
                longest = max(longest, len(self.waiting[0][0].prompt))
                if batch and longest * (len(batch) + 1) > self.prefill_tokens:
                    break
                group = self.waiting[0]
                batch.append([group.popleft() for _ in range(min(free, len(group)))])
                free -= len(batch[-1])
                if not group:
                    self.waiting.popleft()
            hidden.append(self._prefill(batch, longest))
        return hidden

    def _prefill(self, batch: list[list[Sampled]], longest: int) -> Tensor:
        """[rows, H]: the state that predicts each admitted sequence's first token."""
        # Each prompt is computed at the row of its group's first sequence; rows are put in order
        # after.
        first = len(self.live)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for i, members in enumerate(batch):
            ids[i, : len(members[0].prompt)] = torch.tensor(members[0].prompt)
        positions = torch.arange(longest, device=self.device).expand(len(batch), longest)
        where = Span(slice(first, first + len(batch)), positions, longest)
        hidden = self.forward(ids.to(self.device), CachedLayout(self.cache, where))
        last = torch.tensor([len(members[0].prompt) - 1 for members in batch], device=self.device)
        states = hidden[torch.arange(len(batch), device=self.device), last]
        # Spread from the back, so that no prompt is overwritten before it was copied.
        target = first + sum(len(members) for members in batch)
        for i, members in reversed(list(enumerate(batch))):
            for _ in members:
                target -= 1
                if target != first + i:
                    self.cache.copy(first + i, target, len(members[0].prompt))
        self.live += [sequence for members in batch for sequence in members]
        sizes = torch.tensor([len(members) for members in batch], device=self.device)
        return states.repeat_interleave(sizes, 0)

    def _sample(self, hidden: Tensor) -> None:
        column = lambda values: torch.tensor(values, dtype=torch.int64, device=self.device)  # noqa: E731
        uniforms = philox_uniform(
            self.seed,
            column([s.request_id for s in self.live]),
            column([s.sample_index for s in self.live]),
            column([len(s.token_ids) for s in self.live]),
        )
        tokens, logprobs = sample(self.logits(hidden), uniforms, self.params)
        for sequence, token, logprob in zip(
            self.live, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.finish_reason = self.stop.reason(sequence)

    def _free(self, row: int) -> None:
        last = self.live.pop()
        if row < len(self.live):
            self.cache.copy(len(self.live), row, last.length)
            self.live[row] = last


def completion(sequence: Sampled, weights_version: int) -> Completion:
    """What is handed out of a sequence; one that has not ended was aborted."""
    return Completion(
        sequence.token_ids, sequence.logprobs, sequence.finish_reason or "abort", weights_version
    )
