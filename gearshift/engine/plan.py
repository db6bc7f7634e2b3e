"""What one step of the engine computes, and what it samples. The scheduler decides it, the decoder
runs it; neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gearshift.engine.sequence import Sequence
from gearshift.types import TokenScore

Column = tuple[list[int], list[float], list[float]]
"""For one step and each sequence: the token, its log-prob, and its log-prob in the distribution
that it was drawn from.
"""


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompts are computed, and each sequence gets its first token."""

    groups: list[list[Sequence]]
    """Groups of sequences that begin with the same tokens. The blocks of the first sequence hold
    these.
    """
    cached: list[int]
    """Tokens of each group whose keys are in the blocks already."""
    copies: list[tuple[int, int]]
    """Blocks (source, target) that are copied when the prompts are computed."""

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that get tokens."""
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
    """Errors by sequence index: why a sequence got no token. Its entry in the columns means
    nothing.
    """
    scores: dict[int, TokenScore] = field(default_factory=dict)
    """By sequence index, for those that ask: the scores of the tokens of the only column."""
