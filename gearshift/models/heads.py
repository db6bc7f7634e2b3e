"""The head of a value model: it reads hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(state before a token): a linear map of the hidden state, in fp32, zero at the start.

    A head of zeros makes the first advantages the plain returns, so that a fresh head does no harm.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_MH: Tensor) -> Tensor:
        """[M, H] hidden states -> [M] float32 values."""
        values: Tensor = self.linear(hidden_MH.float()).squeeze(-1)
        return values
