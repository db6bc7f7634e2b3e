"""What one step of the engine computes, and what it samples. The scheduler decides it, the decoder
runs it; neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gearshift.engine.sequence import Sequence

Column = tuple[list[int], list[float], list[float]]
"""One token for each sequence: tokens, their log-probs, and their log-probs as drawn."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompts are computed, and each sequence gets its first token."""

    groups: list[list[Sequence]]
    """Sequences that begin with the same tokens, which the first one's blocks take."""
    cached: list[int]
    """Tokens of each group whose keys are in the blocks already."""
    copies: list[tuple[int, int]]
    """Blocks (source, target) that are copied when the prompts are computed."""

    @property
    def sequences(self) -> list[Sequence]:
        """Those that get tokens."""
        return [sequence for group in self.groups for sequence in group]


@dataclass(frozen=True, slots=True)
class Decode:
    """Each sequence gets its next tokens."""

    sequences: list[Sequence]
    steps: int
    """Tokens for each, one after another; there are blocks for them."""


Plan = Prefill | Decode


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens for the sequences of a plan."""

    columns: list[Column]
    """One a step."""
    failed: dict[int, Exception] = field(default_factory=dict)
    """Why a sequence, by its place, got none; its entry in the columns means nothing."""
