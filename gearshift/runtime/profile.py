"""A profile of two steps of a stage, as a Chrome trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gearshift.runtime.files import writing
from gearshift.runtime.terminal import echo


def profiled(steps: range, path: Path) -> Iterator[int]:
    """Yield the steps, and record the second and the third, because the first one compiles and
    measures; the first two where there are no three. The trace goes to `path`; it opens in
    ui.perfetto.dev or chrome://tracing.
    """
    first = 1 if len(steps) > 2 else 0
    recorded = steps[first : first + 2]
    yield from steps[:first]
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as running:
        yield from recorded
    if recorded:
        with writing(path):
            running.export_chrome_trace(str(path))
        echo(f"profile: {len(recorded)} steps from step {recorded[0] + 1} on are in {path}")
    yield from steps[first + 2 :]
