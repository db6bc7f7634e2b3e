"""Engines of DeepSpeed, each for parameters of one precision: what `DeepSpeedAdamW` needs of ZeRO-1
and ZeRO-2, which leave the weights whole, and of ZeRO-3, which splits them. It must not import a
model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.runtime.deepspeed_config import DeepSpeedConfig, require_deepspeed
from gearshift.runtime.optimizer import OptimizerConfig


class WholeWeights:
    """ZeRO-1 or ZeRO-2: the ranks meet in no backward pass, but once in an update."""

    def __init__(
        self, parameters: list[nn.Parameter], config: OptimizerConfig, deepspeed: DeepSpeedConfig
    ) -> None:
        stage = min(deepspeed.stage, 2)
        settings = engine_settings(parameters[0].dtype, deepspeed, stage)
        self._parameters = parameters
        self._engine = _engine(self, nn.ParameterList(parameters), parameters, config, settings)
        # The ranks must not meet in a backward pass, which one of them may not come to.
        for hook in self._engine.optimizer._grad_acc_hooks:
            hook.remove()
        self.zero: Any = self._engine.optimizer
        """DeepSpeed's optimizer."""
        self.adam: Any = self.zero.optimizer
        self.masters: list[Tensor] = self.zero.single_partition_of_fp32_groups
        self._sums: dict[nn.Parameter, Tensor] = {}

    def accumulate(self) -> None:
        """Add the gradients of one of several micro-batches to sums in fp32."""
        for parameter in self._parameters:
            if parameter.grad is None or parameter.dtype.itemsize >= 4:
                continue
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def reduce(self) -> None:
        """Average the gradients over the ranks, each of which gets its part."""
        for parameter in self._parameters:  # all ranks must reduce the same ones
            if parameter in self._sums:
                parameter.grad = self._sums.pop(parameter).to(parameter.dtype)
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with self._engine.coalesce_grad_reduction():
            pass

    def gradients(self) -> Iterator[Tensor]:
        """This rank's part of the gradients that are reduced."""
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()  # they may be on their way to the host
            yield from (x.grad for x in self.masters if x.grad is not None)
        else:
            yield from chain.from_iterable(self.zero.averaged_gradients.values())

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self._sums.clear()
        self.zero.zero_grad()
        for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            for group in kept:
                kept[group] = None
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()

    def write_weights(self) -> None:
        """Write the parameters from the master weights."""
        self.zero.update_lp_params()


class SplitWeights:
    """ZeRO-3: the ranks gather weights and reduce gradients in each pass, so they must run equally
    many.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        config: OptimizerConfig,
        deepspeed: DeepSpeedConfig,
        root: nn.Module,
    ) -> None:
        """`root` has the parameters in it; afterwards they are split."""
        self._parameters = parameters
        settings = engine_settings(parameters[0].dtype, deepspeed, 3)
        self._engine = _engine(self, root, parameters, config, settings)
        self.zero: Any = self._engine.optimizer
        """DeepSpeed's optimizer."""
        self.adam: Any = self.zero.optimizer
        self.masters: list[Tensor] = self.zero.fp32_partitioned_groups_flat

    def accumulate(self) -> None:
        """Reduce what the backward pass of a micro-batch has left to reduce; the next one adds."""
        self.zero.independent_gradient_partition_epilogue()
        self.zero.micro_step_id += 1

    def reduce(self) -> None:
        """The same after the last micro-batch."""
        self.zero.independent_gradient_partition_epilogue()

    def gradients(self) -> Iterator[Tensor]:
        """This rank's part of the gradients that are reduced."""
        if self.zero.offload_optimizer:
            yield from (x.grad for x in self.masters if x.grad is not None)
        else:
            yield from chain.from_iterable(self.zero.averaged_gradients.values())

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        self.zero.micro_step_id = 0  # the next ones are written over those that are there
        self.zero.averaged_gradients = {}
        for bucket in self.zero.ipg_buckets.values():
            bucket.clear_params()
        for parameter in self._parameters:
            parameter.grad = None
        self.zero._partition_all_parameters()  # the embedding and the head are whole until now

    def write_weights(self) -> None:
        """Write the parameters from the master weights."""
        self.zero._partition_all_parameters()
        for group in range(len(self.masters)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)


def _engine(
    owner: WholeWeights | SplitWeights,
    module: nn.Module,
    parameters: list[nn.Parameter],
    config: OptimizerConfig,
    settings: dict[str, Any],
) -> Any:
    """DeepSpeed's engine, which is never called with a batch and ends with its owner."""
    groups: Iterable[dict[str, Any]] = (
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    )
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    library = require_deepspeed()
    engine, *_ = library.initialize(model=module, optimizer=adam, config=settings)
    weakref.finalize(owner, _drop, engine)
    return engine


def _drop(engine: Any) -> None:
    """Free what the parameters keep of an engine whose optimizer is gone."""
    if dist.is_initialized():  # at the end of the program it is not
        engine.destroy()


def engine_settings(dtype: torch.dtype, config: DeepSpeedConfig, stage: int) -> dict[str, Any]:
    """DeepSpeed's own settings: the user's, and what Gearshift decides."""
    given = config.settings()
    zero = {"reduce_bucket_size": 1 << 26, **given.get("zero_optimization", {})}
    zero |= {"stage": stage, "overlap_comm": False}
    if config.offload == "cpu":
        zero["offload_optimizer"] = {**zero.get("offload_optimizer", {}), "device": "cpu"}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        given = {**given, "data_types": {"grad_accum_dtype": "fp32"}}
    else:
        # DeepSpeed insists on its own norm where the state is in the host's memory.
        zero["compute_grad_norm"] = config.offload == "cpu"
    return {
        "steps_per_print": 1 << 30,
        **given,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
