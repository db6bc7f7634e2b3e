"""One update: accumulate the gradients of micro-batches, clip, step. Shared by every trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from gearshift.errors import NumericalError
from gearshift.runtime.optimizer import MasterAdamW

Micro = TypeVar("Micro")


def update(
    micro_batches: Iterable[Micro],
    loss_of: Callable[[Micro], tuple[Tensor, dict[str, Tensor]]],
    *optimizers: MasterAdamW,
) -> dict[str, float]:
    """Sum the losses and metrics of the micro-batches, back-propagate each, then step every
    optimizer.

    A micro-batch's loss is already weighted over the whole batch, so that the sum is the batch's
    loss and its gradient does not depend on the split. Raises `NumericalError` if the loss is not
    finite; nothing is updated.
    """
    totals: dict[str, float] = defaultdict(float)
    for micro in micro_batches:
        loss, metrics = loss_of(micro)
        totals["loss"] += float(loss.detach())
        for name, value in metrics.items():
            totals[name] += float(value.detach())
        if not math.isfinite(totals["loss"]):
            raise NumericalError(
                f"The loss is {totals['loss']}; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        loss.backward()
    lr = optimizers[0].lr
    norms = [optimizer.step() for optimizer in optimizers]
    return {**totals, "grad_norm": norms[0], "learning_rate": lr}
