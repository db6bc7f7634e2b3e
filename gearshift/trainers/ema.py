"""An exponential moving average of the policy, as in DeepSpeed-Chat. It is often better than the
last weights, because it averages the noise of single updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gearshift.runtime.interrupt import shielded


class MovingAverage:
    """a <- decay * a + (1 - decay) * weights after each update, in fp32 on the CPU."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = [p.detach().float().cpu().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average."""
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(p.detach().float().cpu(), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the model holds the average, and afterwards its own weights again."""
        own = [p.detach().to("cpu", copy=True) for p in self.model.parameters()]
        with shielded():  # a signal in the middle would leave a mixture of both
            self._write(self.average)
            try:
                yield
            finally:
                self._write(own)

    @torch.no_grad()
    def _write(self, weights: list[torch.Tensor]) -> None:
        for p, w in zip(self.model.parameters(), weights, strict=True):
            p.copy_(w)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
