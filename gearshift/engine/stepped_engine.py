"""The interface that the loop needs of the engine whose requests it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gearshift.engine.decoder import Decoder
from gearshift.engine.scheduler import Group, Scheduler
from gearshift.engine.sequence import SamplingLimits


class SteppedEngine(Protocol):
    """The part of `Engine` that `EngineLoop` uses."""

    weights_version: int

    @property
    def limits(self) -> SamplingLimits:
        """The limits of a completion."""

    def check_owner(self) -> None:
        """Raises `GearshiftError` unless this thread may use the engine."""

    def check_generating(self) -> None:
        """The same, and the engine must be in its generation gear."""

    def prepare_generation(self) -> None:
        """Detect changes of the weights, and prepack them."""

    def check_weights(self) -> None:
        """Raises `GearshiftError` if the weights have changed while requests run."""

    def new_generation(self, groups: list[Group]) -> tuple[Scheduler, Decoder]:
        """A scheduler and a decoder with an empty cache, in which these groups have room."""

    def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """See `GenerationBackend`."""

    def generating(self) -> AbstractContextManager[Any]:
        """Enter the generation gear."""

    def named_stats(self) -> dict[str, float]:
        """See `GenerationBackend.stats`."""
