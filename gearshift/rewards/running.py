"""Normalises rewards by all values so far. It must not import episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gearshift.rewards.functions import is_usable


@dataclass
class RunningMeanStd:
    """The mean and variance of all values so far (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __call__(self, values: list[float | None]) -> list[float | None]:
        """Add these values, then subtract the mean from each and divide by the standard deviation.
        None and missing values stay as they are, and do not count.
        """
        for x in values:
            if x is not None and is_usable(x):
                self.count += 1
                before, self.mean = self.mean, self.mean + (x - self.mean) / self.count
                self.squares += (x - before) * (x - self.mean)
        std = math.sqrt(self.squares / max(1, self.count)) or 1.0
        return [x if x is None or not is_usable(x) else (x - self.mean) / std for x in values]
