"""What a kernel is asked for: norms, gates, attention, and the size of a block of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

BLOCK = 16
"""P: positions in a block; as many as a CPU's widest registers have lanes (`kernels.cpp`)."""

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [T, in], weight [out, in], bias -> x weight^T + bias [T, out]."""

Gate = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension."""

    module: nn.Module
    eps: float
    center: bool = False
    """LayerNorm: takes away the mean, may have a bias; else RMSNorm."""
    offset: bool = False
    """The weight is stored less one, and multiplied before rounding (Gemma)."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an architecture asks of its attention beyond the product."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    """A query sees the last `window` positions only."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
