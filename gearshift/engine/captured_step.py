"""A decode step over tensors that stay where they are, so that it is captured once and replayed: as
a CUDA graph on a GPU, as a recorded list of kernel calls on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.engine.cached_forward import CachedForward
from gearshift.kernels.specs import AttentionMetadata, Run
from gearshift.models.layers import embed


class StepTensors:
    """What a step reads, and what it writes: the tokens that it samples are the next step's
    input.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        """`columns`: the number of blocks of the longest row, plus one."""
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.block_tables = torch.zeros((rows, columns), dtype=torch.int64, device=device)
        self.temperature = torch.ones(rows, device=device)
        self.uniforms = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(rows, device=device)

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


class CapturedDecodeStep:
    """One step of a fixed number of rows."""

    def __init__(self, forward: CachedForward, rows: int, columns: int, capture: bool) -> None:
        """`capture=False` makes all calls anew in each step."""
        self.tensors = StepTensors(rows, columns, forward.model.device)
        self._forward, self._uncaptured = forward, capture
        self._run = _plain(forward, self.tensors)

    def run(self) -> Tensor:
        """The logits; `ids` and `logprobs` are then those of the sampled tokens."""
        if self._uncaptured:
            self.capture()
        return self._run()

    def capture(self) -> bool:
        """Capture the step, if that is possible; returns whether it is. Sequences keep their place:
        the tokens and positions are as before.
        """
        self._uncaptured, tensors = False, self.tensors
        began = tensors.ids.clone(), tensors.positions.clone()
        captured = _captured(self._forward, tensors)
        tensors.ids.copy_(began[0])  # the capture ran a step
        tensors.positions.copy_(began[1])
        self._run = captured or self._run
        return captured is not None


# These functions hold the tensors and not the step, so that a step that is dropped frees its memory
# at once.


def _advance(forward: CachedForward, tensors: StepTensors) -> None:
    # A row that has ended may still be sampled, but the table of positions has an end.
    tensors.positions.add_(1).clamp_(max=forward.max_length - 1)


def _sample(forward: CachedForward, tensors: StepTensors, logits: Tensor) -> Tensor:
    t = tensors
    forward.kernels.sample(logits, t.temperature, t.uniforms, t.ids, t.logprobs)
    return logits


def _metadata(tensors: StepTensors) -> AttentionMetadata:
    rows = torch.arange(len(tensors.ids), device=tensors.ids.device)
    return AttentionMetadata(rows, tensors.positions, tensors.block_tables)


def _plain(forward: CachedForward, tensors: StepTensors) -> Run:
    def run() -> Tensor:
        _advance(forward, tensors)
        return _sample(forward, tensors, forward(tensors.ids, _metadata(tensors)))

    return run


def _captured(forward: CachedForward, tensors: StepTensors) -> Run | None:
    """The step as the kernels capture it; None for a model that is not described."""
    plan, weights = forward.plan, forward.weights
    if plan is None or weights is None:
        return None
    metadata = _metadata(tensors)
    x, angles = embed(plan, tensors.ids, tensors.positions.clamp(min=0))

    def prepare() -> None:
        _advance(forward, tensors)
        metadata.refresh()
        now, turned = embed(plan, tensors.ids, tensors.positions)
        x.copy_(now)
        for old, new in zip(angles, turned, strict=True):
            old[0].copy_(new[0])
            old[1].copy_(new[1])

    def run() -> Tensor:
        logits = forward.described(plan, weights, x, angles, metadata)
        return _sample(forward, tensors, logits)

    return forward.kernels.capture(prepare, run)
