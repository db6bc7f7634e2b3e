"""The result of a finished run, for the Python program that started it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.pipeline.summary import Summary
from gearshift.runtime.terminal import counted


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its figures and its model."""

    folder: Path
    """The run's folder: recipe, stages, `summary.json`, `report.html`."""
    model: Path
    """The folder of the model that the last stage made; transformers loads it, and so does any
    function here that takes a model."""
    metrics: list[dict[str, Any]]
    """A record for each step of the last stage, as in its `metrics.jsonl`."""
    heldout: dict[str, dict[str, Any]]
    """The held-out figures of each policy, by its name: `base`, then the stages. Empty where the
    run has no task."""
    summary: Summary
    """What `summary.json` holds: seconds and outcome of each stage, comparisons, and more."""

    @property
    def accuracy(self) -> float | None:
        """The share of held-out pairs (or steps) that the last stage's model gets right."""
        outcome = self.summary["stages"][self.model.name]
        return outcome.get("accuracy")

    def __fspath__(self) -> str:
        return str(self.model)

    def __repr__(self) -> str:
        figures = "".join(
            f", {name} {record['metric']} {record['value']:.3f}"
            for name, record in self.heldout.items()
        )
        return f"RunResult({self.model}, {counted(len(self.metrics), 'step')}{figures})"
