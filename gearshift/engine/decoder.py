"""Runs what the scheduler has planned: makes the tensors, computes the logits, samples the tokens.

Decides nothing: which sequences run, and with which blocks, is the plan's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from gearshift.engine.cached_forward import CachedForward
from gearshift.engine.captured_step import CapturedDecodeStep
from gearshift.engine.config import EngineConfig
from gearshift.engine.plan import Column, Decode, Plan, Prefill, Sampled
from gearshift.engine.sampler import adjusts, sample, token_scores
from gearshift.engine.sequence import Sequence
from gearshift.kernels.specs import BLOCK, AttentionMetadata
from gearshift.runtime.progress import Progress
from gearshift.runtime.seeding import philox_uniform
from gearshift.runtime.terminal import counted

_AHEAD = 64
"""How many tokens the uniforms are drawn ahead for: many cost as much as one."""


class Decoder:
    """Samples tokens for plans, with one cache."""

    def __init__(self, forward: CachedForward, config: EngineConfig) -> None:
        self.forward, self.kernels = forward, forward.kernels
        self._device, self._max_rows = forward.model.device, config.max_num_seqs
        self._most_tokens = config.max_num_batched_tokens
        self._captures = config.capture_steps and forward.plan is not None
        self._captured: dict[tuple[int, int], CapturedDecodeStep] = {}

    def run(self, plan: Plan) -> Sampled:
        """Tokens for the plan's sequences."""
        if not self._captured and self._captures and self.kernels.captures_ahead:
            self._capture_ahead()
        return self._prefill(plan) if isinstance(plan, Prefill) else self._decode(plan)

    def forget_captures(self) -> None:
        """Drop the captured steps, because what they read or compute is another now."""
        self._captured.clear()

    def decode_steps(
        self,
        input_ids: Tensor,
        positions: Tensor,
        block_tables: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token after another for each of B rows: [B] newest tokens, their positions, [B, W]
        blocks, [B] temperatures, [S, B] uniforms. The blocks have room for S more, or what goes
        beyond is not needed.

        Returns the last step's [B, V] logits, good until the next call, [S, B] tokens and their
        log-probs; see `Kernels.sample`.
        """
        B, width = block_tables.shape
        step = self._step(self.kernels.padded_rows(B), width)
        inout = step.tensors
        inout.fill(input_ids, positions, block_tables, temperature)
        tokens, logprobs = [], []
        for uniforms_B in uniforms:
            inout.uniforms[:B] = uniforms_B
            logits = step.run()
            tokens.append(inout.ids[:B].clone())
            logprobs.append(inout.logprobs[:B].clone())
        return logits[:B], torch.stack(tokens), torch.stack(logprobs)

    def _step(self, rows: int, width: int) -> CapturedDecodeStep:
        """The step for so many rows of at most `width` blocks."""
        if self._captures and self.kernels.captures_ahead:
            width = self._longest
        # The last column is block 0, which belongs to no sequence: a row that has ended writes
        # there.
        columns = -(-(width + 1) // 8) * 8
        step = self._captured.get((rows, columns))
        if step is None:
            step = CapturedDecodeStep(self.forward, rows, columns, self._captures)
            self._captured[rows, columns] = step
        return step

    @property
    def _longest(self) -> int:
        """The blocks of the longest sequence that there can be."""
        return min(-(-self.forward.max_length // BLOCK), self.forward.cache.capacity)

    def _capture_ahead(self) -> None:
        """Capture the steps of all sizes: the largest first, so that the others use its memory
        again.
        """
        sizes = {self.kernels.padded_rows(rows) for rows in range(1, self._max_rows + 1)}
        # This step allocates the cache, on the stream that uses it.
        CapturedDecodeStep(self.forward, 1, self._longest + 1, capture=False).run()
        with Progress(len(sizes), "capturing decode steps") as progress:
            for rows in sorted(sizes, reverse=True):
                progress.phase(counted(rows, "row"))
                if not self._step(rows, 0).capture():
                    self._captures = False
                    return
                progress.advance()

    def _decode(self, plan: Decode) -> Sampled:
        live = plan.sequences
        newest = torch.tensor([(s.token_ids[-1], s.length - 1) for s in live]).T.to(self._device)
        temperature = torch.tensor([s.params.temperature for s in live]).to(self._device)
        uniforms = self._uniforms(live, plan.steps)
        logits, tokens, logprobs = self.decode_steps(
            newest[0], newest[1], self._block_tables(live), temperature, uniforms
        )
        if any(adjusts(s.params) for s in live):
            sampled = self._sample(live, logits, uniforms[0])
        else:
            drawn = logprobs.tolist()
            sampled = Sampled([*zip(tokens.tolist(), drawn, drawn, strict=True)])
        return self._score(live, logits, sampled)

    def _prefill(self, plan: Prefill) -> Sampled:
        logits = self._prompt_logits(plan)
        if plan.copies:
            sources, targets = zip(*plan.copies, strict=True)
            self.forward.cache.copy(sources, targets)
        sizes = torch.tensor([len(group) for group in plan.groups])
        logits = logits.repeat_interleave(sizes.to(self._device), 0)
        live = plan.sequences
        sampled = self._sample(live, logits, self._uniforms(live, 1)[0])
        return self._score(live, logits, sampled)

    def _prompt_logits(self, plan: Prefill) -> Tensor:
        """[groups, V]: the logits after each group's prompt. A prompt that is too long for one
        forward is computed in pieces, each of which sees the keys of those before.
        """
        leaders = [group[0] for group in plan.groups]
        ids = [
            torch.tensor(leader.tokens[cached:])
            for leader, cached in zip(leaders, plan.cached, strict=True)
        ]
        counts = torch.tensor([len(new) for new in ids])
        rows = torch.repeat_interleave(torch.arange(len(ids)), counts)
        positions = torch.cat(
            [
                torch.arange(cached, cached + len(new))
                for new, cached in zip(ids, plan.cached, strict=True)
            ]
        )
        tokens, ends = torch.cat(ids), counts.cumsum(0) - 1
        tables = self._block_tables(leaders)
        logits = []
        for first in range(0, len(tokens), self._most_tokens):
            some = slice(first, first + self._most_tokens)
            row, last_row = rows[some].aminmax()
            ending = ends[(ends >= some.start) & (ends < some.stop)] - first
            metadata = AttentionMetadata(
                (rows[some] - row).to(self._device),
                positions[some].to(self._device),
                tables[row : last_row + 1],
                ending.to(self._device),
            )
            logits.append(self.forward(tokens[some].to(self._device), metadata))
        return torch.cat(logits)

    def _sample(self, sequences: list[Sequence], logits: Tensor, uniforms: Tensor) -> Sampled:
        """One token for each of the sequences. If that fails, each sequence is tried alone, and
        only those that fail again get an error.
        """
        try:
            return Sampled([self._drawn(sequences, logits, uniforms)])
        except Exception as error:
            if len(sequences) == 1:
                return Sampled([([0], [0.0], [0.0])], {0: error})
        alone = [
            self._sample([sequence], logits[i : i + 1], uniforms[i : i + 1])
            for i, sequence in enumerate(sequences)
        ]
        rows = [[values[0] for values in one.columns[0]] for one in alone]
        tokens, logprobs, drawn_logprobs = map(list, zip(*rows, strict=True))
        failed = {i: one.failed[0] for i, one in enumerate(alone) if one.failed}
        return Sampled([(tokens, logprobs, drawn_logprobs)], failed)

    def _drawn(self, sequences: list[Sequence], logits: Tensor, uniforms: Tensor) -> Column:
        draw, params = self.kernels.sample, [s.params_now for s in sequences]
        written = [(s.prompt, s.token_ids) for s in sequences]
        with self.kernels.batch_invariant() if any(map(adjusts, params)) else nullcontext():
            columns = sample(draw, logits, uniforms, params, written)
        tokens, logprobs, drawn_logprobs = (column.tolist() for column in columns)
        return tokens, logprobs, drawn_logprobs

    def _score(self, sequences: list[Sequence], logits: Tensor, sampled: Sampled) -> Sampled:
        """The same, with the scores that sequences ask for."""
        asked = {
            row: s.params.top_logprobs
            for row, s in enumerate(sequences)
            if s.params.top_logprobs is not None and row not in sampled.failed
        }
        if not asked:
            return sampled
        rows, [column] = list(asked), sampled.columns
        tokens = torch.tensor([column[0][row] for row in rows]).to(self._device)
        with self.kernels.batch_invariant():
            scores = token_scores(logits[rows], tokens, max(asked.values()))
        for row, score in zip(rows, scores, strict=True):
            sampled.scores[row] = score._replace(top=score.top[: asked[row]])
        return sampled

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
        return torch.tensor(ahead, dtype=torch.float64).T.to(self._device)

    def _block_tables(self, sequences: list[Sequence]) -> Tensor:
        """[B, W]: each sequence's blocks, filled up with block 0."""
        width = max(len(s.blocks) for s in sequences)
        tables = [s.blocks + [0] * (width - len(s.blocks)) for s in sequences]
        return torch.tensor(tables).to(self._device)
