"""One update: accumulate the gradients of micro-batches, clip, step. Shared by every trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from gearshift.errors import NumericalError
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW

Micro = TypeVar("Micro")


def update(
    cut: Callable[[int, int], Iterable[Micro]],
    size: MicroBatchSize,
    loss_of: Callable[[Micro], tuple[Tensor, dict[str, Tensor]]],
    *optimizers: MasterAdamW,
) -> dict[str, float]:
    """Sum the losses and metrics of the micro-batches, back-propagate each, then step every
    optimizer.

    A micro-batch's loss is already weighted over the whole batch, so that the sum is the batch's
    loss and its gradient does not depend on the split: of several, gradients in bf16 are added up
    in fp32. `cut` gives them for a number of tokens and of ranks; where memory runs out before any
    optimizer steps, the gradients are dropped and computed again by smaller micro-batches
    (`MicroBatchSize`). Each rank computes its own micro-batches; the metrics are those of all.

    Raises `NumericalError` if the loss or any gradient is not finite, before any optimizer steps;
    nothing is updated, and no gradient is left.
    """

    def undo() -> None:
        for optimizer in optimizers:
            optimizer.drop_gradients()

    try:
        found = size.run(cut, lambda micros: _gradients(micros, loss_of, optimizers), undo)
        norms = [optimizer.norm() for optimizer in optimizers]
    except BaseException:
        undo()
        raise
    totals: dict[str, float] = defaultdict(float)
    for metrics in found:
        for name, value in metrics.items():
            totals[name] += value
    lr = optimizers[0].lr
    for optimizer, norm in zip(optimizers, norms, strict=True):
        optimizer.step(norm)
    return {**totals, "grad_norm": norms[0], "learning_rate": lr}


def _gradients(
    micros: Sequence[Micro],
    loss_of: Callable[[Micro], tuple[Tensor, dict[str, Tensor]]],
    optimizers: Sequence[MasterAdamW],
) -> list[dict[str, float]]:
    """Each micro-batch's loss and metrics; the parameters hold the sum of the gradients then."""
    found = []
    for micro in micros:
        loss, metrics = loss_of(micro)
        values = {name: float(x.detach()) for name, x in {"loss": loss, **metrics}.items()}
        if not math.isfinite(values["loss"]):
            raise NumericalError(
                f"The loss is {values['loss']}; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        found.append(values)
        loss.backward()
        if len(micros) > 1:
            for optimizer in optimizers:
                optimizer.accumulate()
    return found
