"""How fast a stage trains, for its metrics."""

from __future__ import annotations

from collections.abc import Sequence

from gearshift.engine.stats import peak_flops
from gearshift.models.runner import ModelRunner
from gearshift.runtime.distributed import world


def training_speed(seconds: float, runners: Sequence[ModelRunner]) -> dict[str, float]:
    """Tokens a second of the training on all ranks, and on GPUs the share of their rate that the
    models' products took (model FLOPs utilisation).
    """
    done = [(runner.kept.device, runner.model.dtype, *runner.work.take()) for runner in runners]
    own = [
        operations / peak_flops(device, dtype)
        for device, dtype, _, operations in done
        if device.type == "cuda" and operations
    ]
    work = world().gather((done[0][2] if done else 0, own), "the work of a step")
    tokens = sum(tokens for tokens, _ in work)
    if not tokens or not seconds:
        return {}
    figures = {"speed/tokens_per_second": tokens / seconds}
    parts = [part for _, some in work for part in some]
    return {**figures, "speed/mfu": sum(parts) / seconds / len(work)} if parts else figures
