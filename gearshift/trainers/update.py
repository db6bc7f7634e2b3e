"""The optimizer, and one update: accumulate the gradients of micro-batches, clip, step. Shared by
every trainer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gearshift.errors import NumericalError
from gearshift.models.runner import ModelRunner
from gearshift.runtime.deepspeed import DeepSpeedAdamW
from gearshift.runtime.distributed import world
from gearshift.runtime.ends_alone import ends_alone
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig

Micro = TypeVar("Micro")


def optimizer_for(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    total_steps: int,
    runner: ModelRunner | None = None,
) -> MasterAdamW:
    """The optimizer that `scale.strategy` asks for. `runner` runs the model that the parameters are
    of. Raises `ModelError` for a model that DeepSpeed would lay in an order that it cannot use.
    """
    deepspeed = world().deepspeed
    if deepspeed is None:
        return MasterAdamW(parameters, config, total_steps)
    root = runner.zero_root if runner else None
    optimizer = DeepSpeedAdamW(parameters, config, total_steps, deepspeed, root)
    if runner and runner.weights and root is None:
        runner.weights.restore()  # DeepSpeed has laid the weights in buffers of its own
    return optimizer


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
        found = size.run(
            partial(_even, cut), lambda micros: _gradients(micros, loss_of, optimizers), undo
        )
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


def _even(
    cut: Callable[[int, int], Iterable[Micro]], tokens: int, ranks: int
) -> list[tuple[Micro, float]]:
    """Each micro-batch with the weight 1. Ranks that gather layers from each other must run equally
    many: those that are missing repeat the first one with the weight 0.
    """
    micros = [(micro, 1.0) for micro in cut(tokens, ranks)]
    missing = -len(micros) % ranks if world().sharded and micros else 0
    return [*micros, *[(micros[0][0], 0.0)] * missing]


def _gradients(
    micros: Sequence[tuple[Micro, float]],
    loss_of: Callable[[Micro], tuple[Tensor, dict[str, Tensor]]],
    optimizers: Sequence[MasterAdamW],
) -> list[dict[str, float]]:
    """Each micro-batch's loss and metrics; the parameters hold the sum of the gradients then."""
    found: list[dict[str, float]] = []
    lost: list[float] = []
    with ends_alone() if world().sharded else nullcontext():
        for micro, weight in micros:
            loss, metrics = loss_of(micro)
            values = _floats({"loss": loss, **metrics})
            if not math.isfinite(values["loss"]):
                lost.append(values["loss"])
                if not world().sharded:  # otherwise, others wait for this backward pass
                    break
            found.append(values if weight else {})
            (loss * weight if weight != 1.0 else loss).backward()
            if len(micros) > 1:
                for optimizer in optimizers:
                    optimizer.accumulate()
    if lost:
        raise NumericalError(
            f"The loss is {lost[0]}; nothing was updated. Lower lr, "
            "or look for a bad reward or row."
        )
    return found


def _floats(scalars: dict[str, Tensor]) -> dict[str, float]:
    """These scalars on the host. The host waits for its device once."""
    stacked = torch.stack([x.detach().double() for x in scalars.values()])
    return dict(zip(scalars, stacked.tolist(), strict=True))
