"""Losses of preferences. Tensors only. Legend: P pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, margin: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """[P] -log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2.

    Bradley and Terry 1952, as in Ouyang et al. 2022; the margin as in Touvron et al. 2023; the last
    term keeps scores around zero (Eisenstein et al. 2023).
    """
    difference_P = chosen_P - rejected_P
    if margin is not None:
        difference_P = difference_P - margin
    return -F.logsigmoid(difference_P) + center * (chosen_P + rejected_P) ** 2
