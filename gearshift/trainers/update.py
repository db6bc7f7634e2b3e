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
    loss and its gradient does not depend on the split: of several, gradients in bf16 are added up
    in fp32. Raises `NumericalError` if the loss or any gradient is not finite, before any optimizer
    steps; nothing is updated, and no gradient is left.
    """
    micros = list(micro_batches)
    totals: dict[str, float] = defaultdict(float)
    try:
        for micro in micros:
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
            if len(micros) > 1:
                for optimizer in optimizers:
                    optimizer.accumulate()
        norms = [optimizer.norm() for optimizer in optimizers]
    except BaseException:
        for optimizer in optimizers:
            optimizer.drop_gradients()
        raise
    lr = optimizers[0].lr
    for optimizer, norm in zip(optimizers, norms, strict=True):
        optimizer.step(norm)
    return {**totals, "grad_norm": norms[0], "learning_rate": lr}
