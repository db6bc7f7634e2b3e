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
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from gearshift.engine.block_cache import KVCache
from gearshift.engine.decoder import Decoder
from gearshift.engine.sampler import adjusts, sample
from gearshift.engine.sequence import Decode, Sequence
from gearshift.engine.stats import GenerationStats
from gearshift.errors import NumericalError
from gearshift.kernels.specs import BLOCK, AttentionMetadata
from gearshift.runtime.seeding import philox_uniform

_AHEAD = 64
"""Tokens that uniforms are drawn ahead for: many cost what one does."""


class Scheduler:
    """Runs sequences to their ends, at most `max_num_seqs` at a time."""

    def __init__(
        self,
        cache: KVCache,
        decoder: Decoder,
        decode: Decode,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        decode_steps_per_sync: int,
        device: torch.device,
        stats: GenerationStats,
    ) -> None:
        """`decode` turns tokens into text; `decode_steps_per_sync` tokens are drawn between two
        looks.
        """
        self.waiting: deque[deque[Sequence]] = deque()
        self.live: list[Sequence] = []
        self.cache, self.decoder, self.decode, self.device = cache, decoder, decode, device
        self.max_num_seqs, self.max_num_batched_tokens, self.decode_steps_per_sync = (
            max_num_seqs,
            max_num_batched_tokens,
            decode_steps_per_sync,
        )
        self.stats = stats
        self.weights_version = 0

    def add(self, groups: list[list[Sequence]]) -> None:
        """Queue the completions of prompts, each group those of one."""
        self.waiting += map(deque, groups)
        live = len(self.live) + sum(map(len, self.waiting))
        longest = max(len(s.prompt) + s.params.max_new_tokens for group in groups for s in group)
        self.cache.grow(min(live, self.max_num_seqs) * -(-longest // BLOCK))

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
    def sequences(self) -> list[Sequence]:
        """All that wait or run."""
        return self.live + [sequence for group in self.waiting for sequence in group]

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.live

    def step(self, weights_version: int) -> None:
        """One token for every live sequence (or several, where nothing must be looked at between
        them); then new ones are admitted, with their first.
        """
        self.weights_version = weights_version
        began = time.perf_counter()
        if self.live:
            self._make_room()
            self._decode()
        decoded = time.perf_counter()
        while batch := self._next_batch():
            self._prefill(batch)
        self.stats.decode_seconds += decoded - began
        self.stats.prefill_seconds += time.perf_counter() - decoded

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

    def _decode(self) -> None:
        live, steps = [*self.live], self._steps()
        written = sum(len(s.token_ids) for s in live)
        newest = torch.tensor([(s.token_ids[-1], s.length - 1) for s in live]).T.to(self.device)
        temperature = torch.tensor([s.params.temperature for s in live]).to(self.device)
        uniforms = self._uniforms(live, steps)
        logits, tokens, logprobs = self.decoder.steps(
            newest[0], newest[1], self._table(live), temperature, uniforms
        )
        self.stats.decode_steps += steps
        self.stats.decode_positions += steps * sum(s.length for s in live)
        if any(adjusts(s.params) for s in live):
            self._sample(live, logits, uniforms)
        else:
            rows = tokens.tolist(), logprobs.tolist(), logprobs.tolist()
            self._append(live, zip(*rows, strict=True))
        self.stats.decode_tokens += sum(len(s.token_ids) for s in live) - written

    def _steps(self) -> int:
        """How many tokens can be drawn before anybody looks: `decode_steps_per_sync`, if none needs
        more than a temperature and there are blocks for all of them.
        """
        if self.decode_steps_per_sync == 1 or any(adjusts(s.params) for s in self.live):
            return 1
        left = [s.params.max_new_tokens - len(s.token_ids) for s in self.live]
        steps = min(self.decode_steps_per_sync, max(left))
        needed = [
            -(-(s.length + min(steps, own) - 1) // BLOCK) - len(s.blocks)
            for s, own in zip(self.live, left, strict=True)
        ]
        if sum(needed) > self.cache.available:
            return 1
        for sequence, blocks in zip(self.live, needed, strict=True):
            sequence.blocks += [self.cache.allocate() for _ in range(blocks)]
        return steps

    def _sample(self, sequences: list[Sequence], logits: Tensor, uniforms: Tensor) -> None:
        """One token for each of the sequences. If that fails, each is tried alone, and only those
        that fail alone end with the error.
        """
        try:
            drawn = self._drawn(sequences, logits, uniforms[0])
        except Exception as error:
            if len(sequences) == 1:
                sequences[0].fail(error)
                self._leave(sequences[0])
                return
            for i, sequence in enumerate(sequences):
                self._sample([sequence], logits[i : i + 1], uniforms[:, i : i + 1])
            return
        self._append(sequences, [drawn])

    def _drawn(
        self, sequences: list[Sequence], logits: Tensor, uniforms: Tensor
    ) -> tuple[list[int], list[float], list[float]]:
        draw, params = self.decoder.kernels.sample, [s.params for s in sequences]
        with self.decoder.kernels.batch_invariant() if any(map(adjusts, params)) else nullcontext():
            columns = sample(draw, logits, uniforms, params, lambda row: sequences[row].tokens)
        tokens, logprobs, drawn_logprobs = (column.tolist() for column in columns)
        return tokens, logprobs, drawn_logprobs

    def _append(
        self,
        sequences: list[Sequence],
        steps: Iterable[tuple[list[int], list[float], list[float]]],
    ) -> None:
        """Steps of (tokens, log-probs, log-probs as drawn); what comes after a sequence's end is
        dropped. Who has ended leaves, with an error where the log-probs are not numbers.
        """
        for tokens, logprobs, drawn_logprobs in steps:
            rows = zip(sequences, tokens, logprobs, drawn_logprobs, strict=True)
            for sequence, token, logprob, drawn_logprob in rows:
                if sequence.finish_reason is not None:
                    continue
                if _is_number(logprob) and _is_number(drawn_logprob):
                    sequence.append(
                        token, logprob, drawn_logprob, self.weights_version, self.decode
                    )
                else:
                    sequence.fail(
                        NumericalError(
                            "The policy's logits are not finite, so nothing can be sampled; look "
                            "for a learning rate that is too high, or broken weights."
                        )
                    )
        for sequence in [s for s in sequences if s.finish_reason is not None]:
            self._leave(sequence)

    def _uniforms(self, sequences: list[Sequence], steps: int) -> Tensor:
        """[steps, B] float64: each sequence's numbers for its next tokens."""
        short = [s for s in sequences if len(s.uniforms) < len(s.token_ids) + steps]
        if short:
            keys = torch.tensor([[s.seed, s.request_id, s.sample_index] for s in short])
            seeds, requests, samples = keys.T[:, :, None]
            positions = torch.tensor([[len(s.uniforms)] for s in short]) + torch.arange(_AHEAD)
            drawn = philox_uniform(seeds, requests, samples, positions).tolist()
            for sequence, more in zip(short, drawn, strict=True):
                sequence.uniforms += more
        ahead = [s.uniforms[len(s.token_ids) :][:steps] for s in sequences]
        return torch.tensor(ahead, dtype=torch.float64).T.to(self.device)

    def _leave(self, sequence: Sequence) -> None:
        """Give the blocks back; what they hold can be found again by a prompt that goes on."""
        self.live.remove(sequence)
        self.cache.learn(sequence.blocks, sequence.tokens[: max(0, sequence.length - 1)])
        self.cache.release(sequence.blocks)
        sequence.blocks = []

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(deque([sequence]))
        self.stats.preemptions += 1

    # Admission

    def _next_batch(self) -> list[tuple[list[Sequence], int]]:
        """Sequences of the queue that fit, with their blocks, as (those of one beginning, tokens
        whose keys are known).
        """
        tokens = 0
        batch: list[tuple[list[Sequence], int]] = []
        rows = self.max_num_seqs - len(self.live)
        while self.waiting and rows:
            group = self.waiting[0]
            first = group[0].tokens
            known = self.cache.known(first)
            new = len(first) - len(known) * BLOCK
            if batch and tokens + new > self.max_num_batched_tokens:
                break
            # Known blocks that nobody uses count as available until they are shared.
            for block in known:
                self.cache.share(block)
            blocks, tail = -(-len(first) // BLOCK), int(len(first) % BLOCK > 0)
            spare = len(self.live) + sum(len(members) for members, _ in batch)
            free = self.cache.available - (blocks - len(known)) - min(spare, self.max_num_seqs // 4)
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
            self.stats.shared_tokens += len(members) * len(first) - new
            self.stats.prefill_tokens += new
        return batch

    def _prefill(self, batch: list[tuple[list[Sequence], int]]) -> None:
        leaders = [members[0] for members, _ in batch]
        admitted = [sequence for members, _ in batch for sequence in members]
        self.live += admitted
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
        device = self.device
        wanted = (counts.cumsum(0) - 1).to(device)
        places = AttentionMetadata(
            rows.to(device), positions.to(device), self._table(leaders), wanted
        )
        logits = self.decoder(torch.cat(ids).to(device), places)
        copies = [
            (members[0].blocks[-1], follower.blocks[-1])
            for members, _ in batch
            if members[0].length % BLOCK
            for follower in members[1:]
        ]
        if copies:
            sources, targets = zip(*copies, strict=True)
            self.cache.copy(sources, targets)
        sizes = torch.tensor([len(members) for members, _ in batch])
        logits = logits.repeat_interleave(sizes.to(device), 0)
        self._sample(admitted, logits, self._uniforms(admitted, 1))

    def _table(self, sequences: list[Sequence]) -> Tensor:
        """[B, W]: each sequence's blocks, filled up with nobody's."""
        width = max(len(s.blocks) for s in sequences)
        table = [s.blocks + [0] * (width - len(s.blocks)) for s in sequences]
        return torch.tensor(table).to(self.device)


def _is_number(x: float) -> bool:
    return x - x == 0.0
