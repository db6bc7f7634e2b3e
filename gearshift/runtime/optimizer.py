"""AdamW on fp32 masters: the optimizer holds full precision, the model holds what it runs in.

In bf16 alone, an update of 1e-6 on a weight of 0.1 is lost; the master keeps it until it counts.
Masters, gradients and moments are each one flat buffer: one pass for the norm, one fused update,
and three tensors to move where the memory of the device is wanted for something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import get_scheduler

from gearshift.errors import ConfigError, NumericalError
from gearshift.runtime.config import Config

_BLOCK = 256
"""Numbers that share a scale in 8-bit moments; the flat buffers are whole blocks."""


class OptimizerConfig(Config):
    """AdamW, its schedule, and the clip of the gradient's norm."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay; matrices only, never norms and biases."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is scaled down to this norm."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = (
        "constant_with_warmup"
    )
    """How the learning rate goes on after warm-up."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    moments: Literal["float32", "8bit"] = "float32"
    """Precision of the moments; `8bit` (Dettmers et al. 2022, by torchao) takes a quarter."""
    offload: Literal["never", "while_generating", "always"] = "never"
    """Masters and moments in the host's memory: while the policy generates, or always, where the
    update is then computed too. Without a GPU they are there anyway."""


class MasterAdamW:
    """AdamW over a flat fp32 copy of the model's parameters."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, total_steps: int
    ) -> None:
        """Raises `ConfigError` where 8-bit moments are asked for without torchao."""
        trained = [p for p in parameters if p.requires_grad]
        # Matrices first, so that what decays is one run.
        self.parameters = sorted(trained, key=lambda p: p.ndim < 2)
        self.config = config
        device = "cpu" if config.offload == "always" else self.parameters[0].device
        self.device = torch.device(device)
        self.groups = [
            _Flat([p for p in self.parameters if (p.ndim >= 2) == decayed], self.device)
            for decayed in (True, False)
            if any((p.ndim >= 2) == decayed for p in self.parameters)
        ]
        self.optimizer = _adamw(config)(
            [
                {"params": [g.master], "weight_decay": config.weight_decay * g.decayed}
                for g in self.groups
            ],
            lr=config.lr, betas=config.betas, eps=config.eps,
        )  # fmt: skip
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, config.warmup, max(1, total_steps)
        )

    def step(self) -> float:
        """Clip, update, write the model's parameters in place, clear gradients; returns the norm
        before the clip.

        Raises `NumericalError`, and writes nothing, if a gradient is not finite.
        """
        self._move(self.device)
        gradients = [g.gather() for g in self.groups]
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        if not norm < float("inf"):
            raise NumericalError(
                f"The gradient's norm is {norm}; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        if norm > self.config.max_grad_norm:
            for gradient in gradients:
                gradient.mul_(self.config.max_grad_norm / norm)
        for group, gradient in zip(self.groups, gradients, strict=True):
            group.master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self._write_back()
        return norm

    def rest(self) -> None:
        """The policy generates now: make room, if that is asked for. `step` takes it back."""
        if self.config.offload == "while_generating":
            self._move(torch.device("cpu"))

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def nbytes(self) -> int:
        """Masters and moments."""
        moments = (x for state in self.optimizer.state.values() for x in state.values())
        held = [*(g.master for g in self.groups), *(x for x in moments if isinstance(x, Tensor))]
        return sum(part.nbytes for x in held for part in _plain(x).values())

    def state_dict(self) -> dict[str, Any]:
        """Moments, schedule and fp32 masters."""
        state = self.optimizer.state_dict()
        moments = {
            str(i): {k: _plain(x) if isinstance(x, Tensor) else x for k, x in kept.items()}
            for i, kept in state["state"].items()
        }
        return {
            "moments": moments,
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "masters": [g.master.detach() for g in self.groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the model's parameters are written from the masters."""
        now = self.optimizer.state_dict()
        now["state"] = {
            int(i): {k: _whole(x) if isinstance(x, dict) else x for k, x in kept.items()}
            for i, kept in state["moments"].items()
        }
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * 2})
        for group, rate in zip(now["param_groups"], self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(now)
        with torch.no_grad():
            for group, saved in zip(self.groups, state["masters"], strict=True):
                group.master.copy_(saved)
        self._move(self.device)
        self._write_back()

    def _write_back(self) -> None:
        for group in self.groups:
            group.scatter()

    def _move(self, device: torch.device) -> None:
        for group in self.groups:
            if group.master.device == device:
                continue
            group.master.data = group.master.data.to(device)
            state = self.optimizer.state[group.master]
            for name, x in state.items():
                if isinstance(x, Tensor) and x.ndim:
                    state[name] = x.to(device)


class _Flat:
    """Parameters end to end in one fp32 buffer."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.parameters, self.decayed = parameters, parameters[0].ndim >= 2
        self.sizes = [p.numel() for p in parameters]
        rest = -sum(self.sizes) % _BLOCK
        ends = [p.detach().float().flatten().to(device) for p in parameters]
        self.master = torch.cat([*ends, torch.zeros(rest, device=device)]).requires_grad_()

    def gather(self) -> Tensor:
        """The gradients in fp32, end to end; the parameters have none after."""
        flat = torch.zeros_like(self.master)
        for parameter, part in zip(self.parameters, flat.split_with_sizes(self._all), strict=False):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
            parameter.grad = None
        return flat

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the model's parameters in place."""
        parts = self.master.split_with_sizes(self._all)
        for parameter, part in zip(self.parameters, parts, strict=False):
            parameter.copy_(part.view_as(parameter))

    @property
    def _all(self) -> list[int]:
        return [*self.sizes, self.master.numel() - sum(self.sizes)]


def _adamw(config: OptimizerConfig) -> Any:
    if config.moments == "float32":
        return lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "moments=8bit needs torchao; pip install 'gearshift[torchao]', or take float32."
        ) from None
    return lambda groups, **options: AdamW8bit(groups, block_size=_BLOCK, **options)


def _plain(x: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a quantised one is made of, which files can hold."""
    if type(x) is Tensor or isinstance(x, nn.Parameter):
        return {"": x.detach()}
    names, attributes = x.__tensor_flatten__()  # type: ignore[attr-defined]
    signed = torch.tensor(bool(attributes[0]))
    return {**{name: getattr(x, name).detach() for name in names}, "signed": signed}


def _whole(parts: dict[str, Tensor]) -> Tensor:
    """What `_plain` took apart."""
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    quantised: Tensor = OptimState8bit(
        parts["codes"], parts["scale"], parts["qmap"], bool(parts["signed"])
    )
    return quantised
