"""Decides which sequences run: they wait, are admitted while the cache has blocks, decode together,
and leave when they end. This file uses numbers only; it makes no tensors and runs no model.

When the cache is full, the sequence admitted last gives up its blocks and waits again; its keys are
computed again later. Since a token is a function of (seed, request, sample, position) and the
weights, the completion is the same.
"""

from __future__ import annotations

from collections import deque

from gearshift.engine.block_cache import KVCache
from gearshift.engine.config import EngineConfig
from gearshift.engine.plan import Decode, Plan, Prefill, Sampled
from gearshift.engine.sampler import reads_logits
from gearshift.engine.sequence import HasStop, Sequence
from gearshift.engine.stats import GenerationStats
from gearshift.errors import NumericalError
from gearshift.kernels.specs import BLOCK

Group = list[Sequence]
"""Completions of one prompt, which is computed once."""


class Scheduler:
    """Runs sequences to their ends, at most `max_num_seqs` at a time."""

    def __init__(
        self,
        cache: KVCache,
        config: EngineConfig,
        steps_per_sync: int,
        has_stop: HasStop,
        stats: GenerationStats,
    ) -> None:
        """`steps_per_sync` tokens are drawn for each sequence between two checks, where that is
        possible.
        """
        self.waiting: deque[deque[Sequence]] = deque()
        self.live: list[Sequence] = []
        self.cache, self.stats = cache, stats
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self._steps_per_sync, self._has_stop = steps_per_sync, has_stop

    def add(self, groups: list[Group]) -> None:
        """Queue completions; each group holds those of one prompt."""
        others = len(self.live) + sum(map(len, self.waiting))
        self.waiting += map(deque, groups)
        self.cache.open(blocks_for(groups, self.max_num_seqs, others))

    def abort(self, sequence: Sequence) -> None:
        """Remove a sequence that waits or runs. A sequence that has ended is left unchanged."""
        if sequence in self.live:
            self._leave(sequence)
            sequence.finish_reason = "abort"
            return
        for group in self.waiting:
            if sequence in group:
                group.remove(sequence)
                sequence.finish_reason = "abort"
        self.waiting = deque(group for group in self.waiting if group)

    def withdraw_served(self) -> list[Group]:
        """Remove the service's sequences, and give them with what they have; `add` takes them
        again.
        """
        withdrawn = [sequence for sequence in self.sequences if sequence.served]
        for sequence in [s for s in self.live if s.served]:
            self._leave(sequence)
        self.waiting = deque(group for group in self.waiting if not group[0].served)
        return [[sequence] for sequence in withdrawn]

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that wait or run."""
        return self.live + [sequence for group in self.waiting for sequence in group]

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.live

    def schedule(self) -> Plan | None:
        """What to compute next: the prompts of sequences that fit; otherwise a token for every
        running sequence (or several, if nothing must be checked between them). None: nothing runs.
        """
        if prefill := self._admit():
            return prefill
        if not self.live:
            return None
        self._reserve_blocks()
        steps = self._steps_ahead()
        self.stats.decode_steps += steps
        self.stats.decode_positions += steps * sum(s.length for s in self.live)
        return Decode([*self.live], steps)

    def postprocess(self, plan: Plan, sampled: Sampled, weights_version: int) -> None:
        """Append the sampled tokens. What comes after a sequence's end is dropped; a sequence that
        has ended leaves, with an error where the log-probs are not numbers.
        """
        sequences = plan.sequences
        written = sum(len(s.token_ids) for s in sequences)
        for place, error in sampled.failed.items():
            sequences[place].fail(error)
        for tokens, logprobs, drawn_logprobs in sampled.columns:
            rows = zip(sequences, tokens, logprobs, drawn_logprobs, strict=True)
            for place, (sequence, token, logprob, drawn_logprob) in enumerate(rows):
                if sequence.finish_reason is not None:
                    continue
                if _is_number(logprob) and _is_number(drawn_logprob):
                    score = sampled.scores.get(place)
                    sequence.append(
                        token, logprob, drawn_logprob, score, weights_version, self._has_stop
                    )
                else:
                    sequence.fail(
                        NumericalError(
                            "The policy's logits are not finite, so nothing can be sampled; look "
                            "for a learning rate that is too high, or broken weights."
                        )
                    )
        if isinstance(plan, Decode):
            self.stats.decode_tokens += sum(len(s.token_ids) for s in sequences) - written
        for sequence in [s for s in sequences if s.finish_reason is not None]:
            self._leave(sequence)

    def count_seconds(self, plan: Plan, seconds: float) -> None:
        """Add the plan's tokens and time to the figures."""
        if isinstance(plan, Prefill):
            self.stats.prefill_seconds += seconds
        else:
            self.stats.decode_seconds += seconds

    def _reserve_blocks(self) -> None:
        """Give a block to each sequence whose newest token needs a new one. If no block is left,
        sequences wait again, starting with the one admitted last.
        """
        for sequence in list(self.live):
            if len(sequence.blocks) * BLOCK >= sequence.length:
                continue
            while sequence.blocks and not self.cache.available:
                self._preempt(self.live[-1])
            if sequence.blocks:
                sequence.blocks.append(self.cache.allocate())

    def _steps_ahead(self) -> int:
        """How many tokens can be drawn before the next check: `steps_per_sync`, if every sequence
        needs only a temperature and there are blocks for all these tokens. The blocks are taken.
        """
        if self._steps_per_sync == 1 or any(reads_logits(s.params) for s in self.live):
            return 1
        left = [s.params.max_new_tokens - len(s.token_ids) for s in self.live]
        steps = min(self._steps_per_sync, max(left))
        needed = [
            -(-(s.length + min(steps, own) - 1) // BLOCK) - len(s.blocks)
            for s, own in zip(self.live, left, strict=True)
        ]
        if sum(needed) > self.cache.available:
            return 1
        for sequence, blocks in zip(self.live, needed, strict=True):
            sequence.blocks += [self.cache.allocate() for _ in range(blocks)]
        return steps

    def _leave(self, sequence: Sequence) -> None:
        """Release the blocks. A later prompt with the same beginning can still use them."""
        self.live.remove(sequence)
        computed = max(0, sequence.length - 1)
        self.cache.register_prefix(sequence.blocks, sequence.tokens[:computed])
        self.cache.release(sequence.blocks)
        sequence.blocks = []

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(deque([sequence]))
        self.stats.preemptions += 1

    def _admit(self) -> Prefill | None:
        """Sequences of the queue that fit, with their blocks; None if none does."""
        plan = Prefill([], [], [])
        tokens = 0
        while self.waiting and len(self.live) < self.max_num_seqs:
            first = self.waiting[0][0].tokens
            cached = self.cache.match_prefix(first)
            new = len(first) - len(cached) * BLOCK
            if plan.groups and tokens + new > self.max_num_batched_tokens:
                break
            # Cached blocks that nothing uses count as available until they are shared.
            for block in cached:
                self.cache.share(block)
            free = self.cache.available - (-(-len(first) // BLOCK) - len(cached))
            free -= min(len(self.live), self.max_num_seqs // 4)
            if free < 0 and self.live:
                self.cache.release(cached)
                break
            group = self._take_group(first, cached, max(0, free))
            _count_cached(group, len(cached) * BLOCK)
            if len(first) % BLOCK:
                source = group[0].blocks[-1]
                plan.copies.extend((source, follower.blocks[-1]) for follower in group[1:])
            plan.groups.append(group)
            plan.cached.append(len(cached) * BLOCK)
            tokens += new
            self.stats.shared_tokens += len(group) * len(first) - new
            self.stats.prefill_tokens += new
        return plan if plan.groups else None

    def _take_group(self, first: list[int], cached: list[int], free: int) -> list[Sequence]:
        """Admit as many sequences of the first waiting group as there are rows and blocks: one,
        which gets its own blocks, and up to `free` more if each needs one.
        """
        waiting = self.waiting[0]
        leader = waiting.popleft()
        fresh = -(-len(first) // BLOCK) - len(cached)
        leader.blocks = [*cached, *(self.cache.allocate() for _ in range(fresh))]
        self.cache.register_prefix(leader.blocks, first)
        self.live.append(leader)
        group, tail = [leader], int(len(first) % BLOCK > 0)
        while waiting and len(self.live) < self.max_num_seqs and free >= tail:
            if waiting[0].length != len(first):  # it was preempted before
                break
            follower = waiting.popleft()
            follower.blocks = [*leader.blocks[: len(first) // BLOCK]]
            for block in follower.blocks:
                self.cache.share(block)
            if tail:
                follower.blocks.append(self.cache.allocate())
            self.live.append(follower)
            group.append(follower)
            free -= tail
        if not waiting:
            self.waiting.popleft()
        return group


def blocks_for(groups: list[Group], max_num_seqs: int, others: int = 0) -> int:
    """The number of blocks in which these sequences and `others` more can run at a time, if each
    becomes as long as the longest of these can be.
    """
    longest = max(len(s.prompt) + s.params.max_new_tokens for group in groups for s in group)
    return min(others + sum(map(len, groups)), max_num_seqs) * -(-longest // BLOCK)


def _count_cached(group: Group, tokens: int) -> None:
    """Record how many prompt tokens each sequence found in the cache. Those after the first find
    the whole prompt. One that was admitted before keeps its figure.
    """
    for place, sequence in enumerate(group):
        if sequence.cached_tokens is None:
            sequence.cached_tokens = len(sequence.prompt) if place else tokens


def _is_number(x: float) -> bool:
    return x - x == 0.0
