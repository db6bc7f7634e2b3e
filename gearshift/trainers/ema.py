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
from gearshift.runtime.sharded_parameter import loaded_rows, own_rows, saved_rows


class MovingAverage:
    """a <- decay * a + (1 - decay) * weights after each update, in fp32 on the CPU. The model may
    be split over the ranks; each averages its rows then.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = [own_rows(p).detach().float().cpu().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average."""
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(own_rows(p).detach().float().cpu(), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the model holds the average, and afterwards its own weights again."""
        own = [own_rows(p).detach().to("cpu", copy=True) for p in self.model.parameters()]
        with shielded():  # a signal in the middle would leave a mixture of both
            self._write(self.average)
            try:
                yield
            finally:
                self._write(own)

    @torch.no_grad()
    def _write(self, weights: list[torch.Tensor]) -> None:
        for p, w in zip(self.model.parameters(), weights, strict=True):
            own_rows(p).copy_(w)

    def state_dict(self) -> dict[str, Any]:
        each = zip(self.model.parameters(), self.average, strict=True)
        return {"average": [saved_rows(p, average) for p, average in each]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        each = zip(self.model.parameters(), self.average, state["average"], strict=True)
        for p, average, saved in each:
            average.copy_(loaded_rows(p, saved))
