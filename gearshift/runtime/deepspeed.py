"""DeepSpeed's ZeRO in the place of `MasterAdamW`. It must not import a model: it gets parameters.

DeepSpeed keeps master weights and moments, reduces gradients, updates, and gathers the weights,
which then lie in its own buffers. The schedule, the norm and the clip are Gearshift's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from gearshift.errors import CheckpointError, NumericalError
from gearshift.runtime.deepspeed_config import DeepSpeedConfig
from gearshift.runtime.deepspeed_engines import SplitWeights, WholeWeights
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
        root: nn.Module | None = None,
    ) -> None:
        """All ranks must call it. ZeRO-3 splits the parameters that are in `root`. Raises
        `ConfigError` where DeepSpeed is missing.
        """
        self.begun, self.config = 0, config
        self.parameters = [p for p in parameters if p.requires_grad]
        split = {id(p) for p in root.parameters()} if root else set()
        kinds: dict[Any, list[nn.Parameter]] = {}
        for p in self.parameters:
            kinds.setdefault((p.dtype, id(p) in split), []).append(p)
        self.engines: list[WholeWeights | SplitWeights] = []
        for (_, inside), own in kinds.items():
            if root and inside:
                self.engines.append(SplitWeights(own, config, deepspeed, root))
            else:
                self.engines.append(WholeWeights(own, config, deepspeed))
        self._schedules = [
            get_scheduler(config.schedule, engine.adam, config.warmup, max(1, total_steps))
            for engine in self.engines
        ]

    def accumulate(self) -> None:
        """Add the gradients of one of several micro-batches to sums in fp32."""
        for engine in self.engines:
            engine.accumulate()

    def norm(self) -> float:
        """The norm of the ranks' sum of the gradients, which DeepSpeed reduces to parts here.
        Raises `NumericalError` if it is not finite.
        """
        world().meet(self._reduce, "gradients")
        place = self.parameters[0].device
        parts = [squares(x).to(place) for engine in self.engines for x in engine.gradients()]
        # DeepSpeed averages over the ranks.
        norm = world().size * float(world().sum(torch.stack(parts).sum()).sqrt())
        if not norm < float("inf"):
            raise NumericalError(
                "The gradient's norm is not finite; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        return norm

    def _reduce(self) -> None:
        for engine in self.engines:
            engine.reduce()

    def drop_gradients(self) -> None:
        """Forget the gradients when no step will follow."""
        for engine in self.engines:
            engine.drop_gradients()

    def _write(self, scale: float) -> None:
        """DeepSpeed's update by the gradients times `scale`."""

        def update() -> None:
            for engine in self.engines:
                # It divides gradients by this: the mean over the ranks becomes the clipped sum.
                engine.zero.override_loss_scale(1.0 / (world().size * scale))
                engine.zero.step()
                engine.zero.override_loss_scale(1.0)
                engine.zero.zero_grad()

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
        for engine, schedule in zip(self.engines, self._schedules, strict=True):
            schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * 2})
            for group, rate in zip(engine.adam.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
            world().meet(engine.write_weights, "weights")

    def _state(self) -> Iterator[Tensor]:
        for engine in self.engines:
            for master in engine.masters:
                yield master
                kept = engine.adam.state[master]
                yield from (kept[name] for name in _MOMENTS if name in kept)

    def _updates(self) -> float:
        """How many updates Adam's moments have seen."""
        states = [x for engine in self.engines for x in engine.adam.state.values()]
        return float(states[0]["step"]) if states and states[0] else 0.0

    def _make_moments(self, updates: float) -> None:
        if not updates:
            return
        for engine in self.engines:
            for master in engine.masters:
                kept = engine.adam.state[master]
                kept["step"] = torch.tensor(updates, device=master.device)
                kept |= {name: torch.zeros_like(master.detach()) for name in _MOMENTS}
