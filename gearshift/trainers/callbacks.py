"""Functions of the caller that a stage calls between its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gearshift.errors import ConfigError
from gearshift.runtime.metrics import MetricsLog


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions of the caller that a stage calls between its steps.

    What one of them raises ends the run, unchanged; the steps so far are saved, and the same run
    goes on after them.
    """

    on_step: Callable[[int, dict[str, Any]], object] | None = None
    """(step, metrics) after each step; steps count from 0, as in `metrics.jsonl`."""
    on_rollout: Callable[[int, list[dict[str, Any]]], object] | None = None
    """(step, episodes) after each step of RL, as `rollouts.jsonl` holds them."""
    on_checkpoint: Callable[[int, Path], object] | None = None
    """(steps that are done, folder) after each checkpoint."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for one that cannot be called, or that would have to be awaited."""
        for each in fields(self):
            function = getattr(self, each.name)
            if function is not None and not callable(function):
                raise ConfigError(f"{each.name} is {function!r:.80}; give a function.")
            if inspect.iscoroutinefunction(function):
                raise ConfigError(f"{each.name} is async, and nothing awaits it; take `async` out.")

    def after_step(self, step: int, metrics: MetricsLog, rollouts: MetricsLog) -> None:
        """Call those that take the records of this step."""
        if self.on_step and metrics.newest.get("step") == step:
            self.on_step(step, dict(metrics.newest))
        if self.on_rollout and rollouts.newest.get("step") == step:
            self.on_rollout(step, rollouts.newest["episodes"])
