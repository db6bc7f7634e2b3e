"""Heads that read hidden states: the value net of step 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(state before a token): a linear map of the hidden state, in fp32, zero at the start.

    Starting at zero makes the first advantages the plain returns, so that a fresh head does no
    harm. `detach` keeps the value loss out of the shared trunk.
    """

    def __init__(self, hidden_size: int, detach: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden_MH: Tensor) -> Tensor:
        """[M, H] hidden states -> [M] float32 values."""
        hidden_MH = hidden_MH.detach() if self.detach else hidden_MH
        values: Tensor = self.linear(hidden_MH.float()).squeeze(-1)
        return values
