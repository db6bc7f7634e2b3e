"""How fast a stage trains, for its metrics."""

from __future__ import annotations

from collections.abc import Sequence

from gearshift.engine.stats import peak_flops
from gearshift.models.runner import ModelRunner


def training_speed(seconds: float, runners: Sequence[ModelRunner]) -> dict[str, float]:
    """Tokens a second of the training, and on a GPU the share of its rate that the models' products
    took (model FLOPs utilisation).
    """
    done = [(runner.model, *runner.work.take()) for runner in runners]
    if not done or not seconds or not done[0][1]:
        return {}
    figures = {"speed/tokens_per_second": done[0][1] / seconds}
    parts = [
        operations / peak_flops(model.device, model.dtype)
        for model, _, operations in done
        if model.device.type == "cuda" and operations
    ]
    return {**figures, "speed/mfu": sum(parts) / seconds} if parts else figures
