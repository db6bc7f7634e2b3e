"""A decode step over tensors that stay where they are, so that it is captured once and replayed: as
a CUDA graph on a GPU, as a recorded list of kernel calls on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gearshift.engine.cached_forward import CachedForward
from gearshift.kernels.specs import AttentionMetadata
from gearshift.models.layers import embed


class CapturedDecodeStep:
    """One step of a fixed number of rows. The tokens that it samples are the next step's input."""

    def __init__(self, forward: CachedForward, rows: int, columns: int) -> None:
        """`columns`: the number of blocks of the longest row, plus one."""
        device = forward.model.device
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.block_tables = torch.zeros((rows, columns), dtype=torch.int64, device=device)
        self.temperature = torch.ones(rows, device=device)
        self.uniforms = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(rows, device=device)
        self._metadata = AttentionMetadata(
            torch.arange(rows, device=device), self.positions, self.block_tables
        )
        self._forward = forward
        self._run: Callable[[], Tensor] | None = None

    def fill(
        self, input_ids: Tensor, positions: Tensor, block_tables: Tensor, temperature: Tensor
    ) -> None:
        """Set the rows' newest tokens; rows beyond them belong to no sequence."""
        B, width = block_tables.shape
        self.ids[:B] = input_ids
        self.positions[:B] = positions - 1  # a step begins with an increment
        self.positions[B:] = -1
        self.block_tables.zero_()
        self.block_tables[:B, :width] = block_tables
        self.temperature[:B] = temperature

    def run(self) -> Tensor:
        """The logits; `ids` and `logprobs` are then those of the sampled tokens."""
        if self._run is None:
            self._run = self._capture()
        return self._run()

    def _capture(self) -> Callable[[], Tensor]:
        forward, metadata = self._forward, self._metadata
        plan, weights = forward.plan, forward.weights

        def sample(logits: Tensor) -> Tensor:
            forward.kernels.sample(logits, self.temperature, self.uniforms, self.ids, self.logprobs)
            return logits

        def advance() -> None:
            # A row that has ended may still be sampled, but the table of positions has an end.
            self.positions.add_(1).clamp_(max=forward.max_length - 1)

        def plain() -> Tensor:
            advance()
            anew = AttentionMetadata(metadata.seq_ids, self.positions, self.block_tables)
            return sample(forward(self.ids, anew))

        if plan is None or weights is None:
            return plain
        x, angles = embed(plan, self.ids, self.positions.clamp(min=0))

        def prepare() -> None:
            advance()
            metadata.refresh()
            now, turned = embed(plan, self.ids, self.positions)
            x.copy_(now)
            for old, new in zip(angles, turned, strict=True):
                old[0].copy_(new[0])
                old[1].copy_(new[1])

        def run() -> Tensor:
            return sample(forward.described(plan, weights, x, angles, metadata))

        began = self.ids.clone(), self.positions.clone()
        captured = forward.kernels.capture(prepare, run)
        self.ids.copy_(began[0])  # the capture ran a step
        self.positions.copy_(began[1])
        return captured or plain
