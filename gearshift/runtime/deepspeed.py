"""DeepSpeed's ZeRO-1 and ZeRO-2 in the place of `MasterAdamW`. It must not import a model: it gets
parameters.

DeepSpeed keeps master weights and moments, reduces gradients, updates, and gathers the weights,
which then lie in its own buffers. The schedule, the sum over micro-batches, the norm and the clip
are Gearshift's: the ranks meet in no backward pass, but once in an update.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import get_scheduler

from gearshift.errors import CheckpointError, NumericalError
from gearshift.runtime.deepspeed_config import DeepSpeedConfig, require_deepspeed
from gearshift.runtime.distributed import Part, world
from gearshift.runtime.flat import squares
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.terminal import counted

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedAdamW(MasterAdamW):
    """AdamW whose master weights and moments DeepSpeed keeps, each rank's part on that rank.

    The parameters of one precision are one engine of DeepSpeed, as its buffers have one type.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        total_steps: int,
        deepspeed: DeepSpeedConfig,
    ) -> None:
        """All ranks must call it. Raises `ConfigError` where DeepSpeed is missing."""
        self.begun, self.config = 0, config
        self.parameters = [p for p in parameters if p.requires_grad]
        kinds = dict.fromkeys(p.dtype for p in self.parameters)
        engines = [
            _engine([p for p in self.parameters if p.dtype == kind], config, deepspeed)
            for kind in kinds
        ]
        for engine in engines:
            weakref.finalize(self, _drop, engine)
        self.zeros: list[Any] = [engine.optimizer for engine in engines]
        """DeepSpeed's optimizers."""
        self._engines = engines
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._schedules = [
            get_scheduler(config.schedule, zero.optimizer, config.warmup, max(1, total_steps))
            for zero in self.zeros
        ]

    def accumulate(self) -> None:
        """Add the gradients of one of several micro-batches to sums in fp32."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.dtype.itemsize >= 4:
                continue
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def norm(self) -> float:
        """The norm of the ranks' sum of the gradients, which DeepSpeed reduces to parts here.
        Raises `NumericalError` if it is not finite.
        """
        world().meet(self._reduce, "gradients")
        sums = [squares(part).to(self.parameters[0].device) for part in self._gradients()]
        # DeepSpeed averages over the ranks.
        norm = world().size * float(world().sum(torch.stack(sums).sum()).sqrt())
        if not norm < float("inf"):
            raise NumericalError(
                "The gradient's norm is not finite; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        return norm

    def _gradients(self) -> Iterator[Tensor]:
        """This rank's part of the gradients that DeepSpeed has reduced."""
        for zero in self.zeros:
            if zero.cpu_offload:
                zero._wait_for_offload_copies()  # they may be on their way to the host
                yield from (x.grad for x in zero.single_partition_of_fp32_groups)
            else:
                yield from chain.from_iterable(zero.averaged_gradients.values())

    def _reduce(self) -> None:
        for parameter in self.parameters:  # all ranks must reduce the same ones
            if parameter in self._sums:
                parameter.grad = self._sums.pop(parameter).to(parameter.dtype)
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for engine in self._engines:
            with engine.coalesce_grad_reduction():
                pass

    def drop_gradients(self) -> None:
        """Forget the gradients when no step will follow."""
        self._sums.clear()
        for zero in self.zeros:
            zero.zero_grad()
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                for group in kept:
                    kept[group] = None
            if zero.cpu_offload:
                zero.reset_cpu_buffers()

    def _write(self, scale: float) -> None:
        """DeepSpeed's update by the gradients times `scale`."""

        def update() -> None:
            for zero in self.zeros:
                # It divides gradients by this: the mean over the ranks becomes the clipped sum.
                zero.override_loss_scale(1.0 / (world().size * scale))
                zero.step()
                zero.override_loss_scale(1.0)
                zero.zero_grad()

        world().meet(update, "an update of DeepSpeed")
        for schedule in self._schedules:
            schedule.step()

    def offload_state(self) -> None:
        """Nothing: `scale.deepspeed.offload` says where the state is."""

    def _bring_back(self) -> None:
        """Nothing, for the same reason."""

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedules[0].get_last_lr()[0])

    def nbytes(self) -> int:
        """The bytes of this rank's master weights and moments."""
        return sum(x.nbytes for x in self._state())

    def state_dict(self) -> dict[str, Any]:
        """This rank's master weights and moments, and the schedule: for as many ranks."""
        known = self._schedules[0].state_dict()
        return {
            "deepspeed": [Part(x.detach(), None) for x in self._state()],
            "schedule": {k: v for k, v in known.items() if k != "lr_lambdas"},
            "updates": self._updates(),
            "ranks": world().size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state, and write the model's parameters from the master weights. Raises
        `CheckpointError` for the state of another number of ranks.
        """
        if (ranks := state.get("ranks", 1)) != world().size:
            raise CheckpointError(
                f"The checkpoint's optimizer is that of {counted(ranks, 'rank')}, and DeepSpeed's "
                "parts fit no other number; start as many processes, or choose another run.dir."
            )
        self._make_moments(state["updates"])
        with torch.no_grad():
            for own, saved in zip(self._state(), state["deepspeed"], strict=True):
                own.copy_(saved.own if isinstance(saved, Part) else saved)
        for zero, schedule in zip(self.zeros, self._schedules, strict=True):
            schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * 2})
            for group, rate in zip(
                zero.optimizer.param_groups, schedule.get_last_lr(), strict=True
            ):
                group["lr"] = rate
            world().meet(zero.update_lp_params, "weights")

    def _state(self) -> Iterator[Tensor]:
        for zero in self.zeros:
            for master in zero.single_partition_of_fp32_groups:
                yield master
                kept = zero.optimizer.state[master]
                yield from (kept[name] for name in _MOMENTS if name in kept)

    def _updates(self) -> float:
        """How many updates Adam's moments have seen."""
        states = [x for zero in self.zeros for x in zero.optimizer.state.values()]
        return float(states[0]["step"]) if states and states[0] else 0.0

    def _make_moments(self, updates: float) -> None:
        if not updates:
            return
        for zero in self.zeros:
            for master in zero.single_partition_of_fp32_groups:
                kept = zero.optimizer.state[master]
                kept["step"] = torch.tensor(updates, device=master.device)
                kept |= {name: torch.zeros_like(master.detach()) for name in _MOMENTS}


def _engine(
    parameters: list[nn.Parameter], config: OptimizerConfig, deepspeed: DeepSpeedConfig
) -> Any:
    """DeepSpeed's engine of parameters of one precision; it is never called with a batch."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    engine, *_ = require_deepspeed().initialize(
        model=nn.ParameterList(parameters),
        optimizer=adam,
        config=_settings(parameters[0].dtype, deepspeed),
    )
    # The ranks must not meet in a backward pass, which one of them may not come to.
    for hook in engine.optimizer._grad_acc_hooks:
        hook.remove()
    return engine


def _drop(engine: Any) -> None:
    """Free what the parameters keep of an engine whose optimizer is gone."""
    if dist.is_initialized():  # at the end of the program it is not
        engine.destroy()


def _settings(dtype: torch.dtype, config: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's own settings: the user's, and what Gearshift decides."""
    given = config.settings()
    zero = {"reduce_bucket_size": 1 << 26, **given.get("zero_optimization", {})}
    zero |= {"stage": config.stage, "overlap_comm": False, "compute_grad_norm": False}
    if config.offload == "cpu":
        zero["compute_grad_norm"] = True  # DeepSpeed insists on it
        zero["offload_optimizer"] = {**zero.get("offload_optimizer", {}), "device": "cpu"}
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
