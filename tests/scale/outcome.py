"""What a training comes to, as a check compares it: weights, metrics, rollouts and records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.runtime.metrics import MEASURED, read_metrics

_OF_THE_MACHINE = ("seconds", "digest", "digests", "made_from", "base", "files")
"""Parts of a record that differ from one run to the next."""


@dataclass
class Outcome:
    """What one training came to."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """A record for each step, without what measures the machine."""
    speeds: list[dict[str, Any]] = field(default_factory=list)
    """The rest of each record."""
    episodes: list[list[dict[str, Any]]] = field(default_factory=list)
    """All sampled episodes, by step."""
    records: dict[str, Any] = field(default_factory=dict)
    """Held-out records, and what a run ends with."""
    digests: list[str] = field(default_factory=list)
    """A digest of the weights that each rank ended with."""
    error: str = ""

    @classmethod
    def of(cls, folder: Path, modules: Mapping[str, nn.Module | list[Tensor]]) -> Outcome:
        """What a stage left in its folder and in these modules."""
        weights = {}
        for name, module in modules.items():
            state = module.state_dict() if isinstance(module, nn.Module) else enumerate(module)
            for key, value in dict(state).items():
                weights[f"{name}/{key}"] = value.detach().cpu().clone()
        found = cls(weights)
        if (folder / "metrics.jsonl").exists():
            steps = read_metrics(folder / "metrics.jsonl")
            found.metrics = [_only(step, measured=False) for step in steps]
            found.speeds = [_only(step, measured=True) for step in steps]
        if (folder / "rollouts.jsonl").exists():
            lines = (folder / "rollouts.jsonl").read_text().splitlines()
            found.episodes = [json.loads(line)["episodes"] for line in lines]
        return found

    def add_records(self, folder: Path) -> None:
        """Read the run's held-out records, and what its stages ended with."""
        for path in (*folder.glob("validation/*.json"), *folder.glob("*/done.json")):
            content = json.loads(path.read_text())
            content = content.get("content", content)
            for name in _OF_THE_MACHINE:
                content.pop(name, None)
            self.records[str(path.relative_to(folder))] = content

    def digest(self) -> str:
        """A digest of the weights, to the bit."""
        found = hashlib.blake2b()
        for name, value in self.weights.items():
            found.update(name.encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def _only(step: Mapping[str, Any], measured: bool) -> dict[str, Any]:
    return {name: x for name, x in step.items() if name.startswith(MEASURED) == measured}


def distance(one: Any, other: Any) -> float:
    """The greatest difference between numbers of two nested records, relative to those above 1;
    infinite where anything else differs.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return float("inf")
        return max((distance(one[k], other[k]) for k in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return float("inf")
        return max((distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return float((one.float() - other.float()).abs().max()) if one.numel() else 0.0
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (one, other))
    if numbers and one != other:
        return abs(one - other) / max(1.0, abs(one))
    return 0.0 if one == other else float("inf")
