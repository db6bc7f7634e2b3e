"""The marks under the curves of a stage: steps at which something happened. It must not import
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from gearshift.runtime.curves import Columns, matching

_LOST = ("left_out/*", "environment/failures")
"""Metrics that count the episodes lost so far."""
_PHASE = "seconds/"


def marks(figures: Columns, checkpoints: Sequence[int]) -> dict[str, list[float]]:
    """For each kind of mark its steps: `checkpoint`; `lost`, where episodes were left out; and each
    phase that less than half of the steps have. A kind without a step is left out.
    """
    steps = figures.get("step", [])
    found: dict[str, set[float]] = {"checkpoint": set(checkpoints), "lost": set()}
    for name in matching(figures, _LOST):
        before = 0.0
        for step, value in zip(steps, figures[name], strict=True):
            if step is not None and value is not None and value > before:
                found["lost"].add(step)
            before = before if value is None else value
    for name in matching(figures, [f"{_PHASE}*"]):
        own = {s for s, x in zip(steps, figures[name], strict=True) if None not in (s, x)}
        if 2 * len(own) < len(steps):
            found[name.removeprefix(_PHASE)] = {step for step in own if step is not None}
    return {name: sorted(own) for name, own in found.items() if own}
