"""Who runs when: sequences wait, are admitted as blocks of the cache allow, decode together, and
leave when they end. A freed place is taken at the next step.

When the cache runs out, the sequence admitted last gives up its blocks and waits again; what it had
written is computed anew later. Since a token is a function of (seed, request, sample, position) and
the weights, the completion is the same.
Legend: B live sequences, T tokens of one forward, W blocks of the longest sequence.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.engine.cache import BLOCK, BlockCache
from gearshift.engine.kernels import Places
from gearshift.engine.requests import Decode, Sequence
from gearshift.engine.sampler import Draw, sample
from gearshift.errors import NumericalError
from gearshift.runtime.seeding import philox_uniform

Forward = Callable[[Tensor, Places], Tensor]
"""[T] token ids and their places -> [B, C], the states of those that the places want."""
Logits = Callable[[Tensor], Tensor]
"""[B, C] -> [B, V]."""


_AHEAD = 64
"""Tokens that uniforms are drawn ahead for: many cost what one does."""


@dataclass(slots=True)
class Timing:
    """What the scheduler has done, since it was last set to zero."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_tokens: int = 0
    """Prompt tokens computed; those whose keys were known are not among them."""
    shared_tokens: int = 0
    """Prompt tokens that were not computed, because their keys were there."""
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_positions: int = 0
    """Cached positions that decoding looked at, over all steps and rows."""
    preemptions: int = 0


class Scheduler:
    """Runs sequences to their ends, at most `max_rows` at a time."""

    def __init__(
        self,
        cache: BlockCache,
        forward: Forward,
        logits: Logits,
        draw: Draw,
        decode: Decode,
        max_rows: int,
        prefill_tokens: int,
        device: torch.device,
        timing: Timing,
    ) -> None:
        self.waiting: deque[deque[Sequence]] = deque()
        self.live: list[Sequence] = []
        self.cache, self.forward, self.logits, self.draw = cache, forward, logits, draw
        self.decode, self.device = decode, device
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.timing = timing

    def add(self, group: list[Sequence]) -> None:
        """Queue the completions of one prompt."""
        self.waiting.append(deque(group))

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. One that has ended stays as it is."""
        if sequence in self.live:
            self._leave(sequence)
            sequence.finish_reason = "abort"
            return
        for group in self.waiting:
            if sequence in group:
                group.remove(sequence)
                sequence.finish_reason = "abort"
        self.waiting = deque(group for group in self.waiting if group)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.live

    def step(self) -> None:
        """One token for every live sequence, new ones admitted first."""
        began = time.perf_counter()
        hidden = []
        if self.live:
            self._make_room()
            hidden.append(self._decode())
            self.timing.decode_tokens += len(self.live)
            self.timing.decode_steps += 1
            self.timing.decode_positions += sum(s.length for s in self.live)
        decoded = time.perf_counter()
        hidden += self._admit()
        prefilled = time.perf_counter()
        self._sample(torch.cat(hidden))
        for sequence in [s for s in self.live if s.finish_reason is not None]:
            self._leave(sequence)
        self.timing.prefill_seconds += prefilled - decoded
        self.timing.decode_seconds += time.perf_counter() - began - (prefilled - decoded)

    # Live sequences

    def _make_room(self) -> None:
        """A block for each live sequence whose newest token opens one; who has none waits."""
        for sequence in list(self.live):
            if len(sequence.blocks) * BLOCK >= sequence.length:
                continue
            while sequence.blocks and not self.cache.available:
                self._preempt(self.live[-1])
            if sequence.blocks:
                sequence.blocks.append(self.cache.allocate())

    def _decode(self) -> Tensor:
        """[B, C]: the state after each live sequence's newest token."""
        ids = torch.tensor([s.token_ids[-1] for s in self.live])
        positions = torch.tensor([s.length - 1 for s in self.live])
        places = self._places(self.live, torch.arange(len(self.live)), positions)
        return self.forward(ids.to(self.device), places)

    def _sample(self, hidden: Tensor) -> None:
        drawn = sample(
            self.draw,
            self.logits(hidden),
            self._uniforms(),
            [s.params for s in self.live],
            lambda row: self.live[row].tokens,
        )
        tokens, logprobs, drawn_logprobs = (column.tolist() for column in drawn)
        if not all(map(_is_number, logprobs)):
            raise NumericalError(
                "The policy's logits are not finite, so nothing can be sampled; look for a "
                "learning rate that is too high, or broken weights."
            )
        rows = zip(self.live, tokens, logprobs, drawn_logprobs, strict=True)
        for sequence, token, logprob, drawn_logprob in rows:
            sequence.append(token, logprob, drawn_logprob, self.decode)

    def _uniforms(self) -> Tensor:
        """[B] float64: each live sequence's number for its next token."""
        if short := [s for s in self.live if len(s.uniforms) == len(s.token_ids)]:
            keys = torch.tensor([[s.seed, s.request_id, s.sample_index] for s in short])
            seeds, requests, samples = keys.T[:, :, None]
            positions = torch.tensor([[len(s.uniforms)] for s in short]) + torch.arange(_AHEAD)
            drawn = philox_uniform(seeds, requests, samples, positions).tolist()
            for sequence, more in zip(short, drawn, strict=True):
                sequence.uniforms += more
        ahead = [s.uniforms[len(s.token_ids)] for s in self.live]
        return torch.tensor(ahead, dtype=torch.float64, device=self.device)

    def _leave(self, sequence: Sequence) -> None:
        """Give the blocks back; what they hold can be found again by a prompt that goes on."""
        self.live.remove(sequence)
        self.cache.learn(sequence.blocks, sequence.tokens[: max(0, sequence.length - 1)])
        self.cache.release(sequence.blocks)
        sequence.blocks = []

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(deque([sequence]))
        self.timing.preemptions += 1

    # Admission

    def _admit(self) -> list[Tensor]:
        """[new, C] states that predict the next token of each admitted sequence, batch by batch."""
        hidden = []
        while batch := self._next_batch():
            hidden.append(self._prefill(batch))
        return hidden

    def _next_batch(self) -> list[tuple[list[Sequence], int]]:
        """Sequences of the queue that fit, with their blocks, as (those of one beginning, tokens
        whose keys are known).
        """
        tokens = 0
        batch: list[tuple[list[Sequence], int]] = []
        rows = self.max_rows - len(self.live)
        while self.waiting and rows:
            group = self.waiting[0]
            first = group[0].tokens
            known = self.cache.known(first)
            new = len(first) - len(known) * BLOCK
            if batch and tokens + new > self.prefill_tokens:
                break
            # Known blocks that nobody uses count as available until they are shared.
            for block in known:
                self.cache.share(block)
            blocks, tail = -(-len(first) // BLOCK), int(len(first) % BLOCK > 0)
            spare = len(self.live) + sum(len(members) for members, _ in batch)
            free = self.cache.available - (blocks - len(known)) - min(spare, self.max_rows // 4)
            if free < 0 and spare:
                self.cache.release(known)
                break
            leader = group.popleft()
            members = [leader]
            leader.blocks = [
                *known, *(self.cache.allocate() for _ in range(blocks - len(known)))
            ]  # fmt: skip
            self.cache.learn(leader.blocks, first)
            rows, free = rows - 1, max(0, free)
            while group and rows and group[0].length == len(first) and free >= tail:
                follower = group.popleft()
                follower.blocks = [*leader.blocks[: len(first) // BLOCK]]
                for block in follower.blocks:
                    self.cache.share(block)
                if tail:
                    follower.blocks.append(self.cache.allocate())
                members.append(follower)
                rows, free = rows - 1, free - tail
            if not group:
                self.waiting.popleft()
            batch.append((members, len(known) * BLOCK))
            tokens += new
            self.timing.shared_tokens += len(members) * len(first) - new
            self.timing.prefill_tokens += new
        return batch

    def _prefill(self, batch: list[tuple[list[Sequence], int]]) -> Tensor:
        leaders = [members[0] for members, _ in batch]
        ids = [
            torch.tensor(leader.tokens[known:])
            for leader, (_, known) in zip(leaders, batch, strict=True)
        ]
        counts = torch.tensor([len(new) for new in ids])
        rows = torch.repeat_interleave(torch.arange(len(batch)), counts)
        positions = torch.cat(
            [
                torch.arange(known, known + len(new))
                for new, (_, known) in zip(ids, batch, strict=True)
            ]
        )
        places = self._places(leaders, rows, positions, counts.cumsum(0) - 1)
        states = self.forward(torch.cat(ids).to(self.device), places)
        copies = [
            (members[0].blocks[-1], follower.blocks[-1])
            for members, _ in batch
            if members[0].length % BLOCK
            for follower in members[1:]
        ]
        if copies:
            sources, targets = zip(*copies, strict=True)
            self.cache.copy(sources, targets)
        self.live += [sequence for members, _ in batch for sequence in members]
        sizes = torch.tensor([len(members) for members, _ in batch])
        return states.repeat_interleave(sizes.to(self.device), 0)

    def _places(
        self,
        sequences: list[Sequence],
        rows: Tensor,
        positions: Tensor,
        wanted: Tensor | None = None,
    ) -> Places:
        width = max(len(s.blocks) for s in sequences)
        table = torch.tensor([s.blocks + [0] * (width - len(s.blocks)) for s in sequences])
        device = self.device
        return Places(
            rows.to(device),
            positions.to(device),
            table.to(device),
            None if wanted is None else wanted.to(device),
        )


def _is_number(x: float) -> bool:
    return x - x == 0.0
