"""AdamW on fp32 masters: the optimizer holds full precision, the model holds what it runs in.

In bf16 alone, an update of 1e-6 on a weight of 0.1 is lost; the master keeps it until it counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import get_scheduler

from gearshift.errors import NumericalError
from gearshift.runtime.config import Config


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


class MasterAdamW:
    """AdamW whose parameters are fp32 copies of the model's (or the model's own, where they are
    fp32).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, total_steps: int
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config = config
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.parameters
        ]
        decayed = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
        )  # fmt: skip
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, config.warmup, max(1, total_steps)
        )

    def step(self) -> float:
        """Clip, update, write the model's parameters in place, clear gradients; returns the norm
        before the clip.

        Raises `NumericalError`, and writes nothing, if a gradient is not finite.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm))
        if not norm < float("inf"):
            self.optimizer.zero_grad()
            raise NumericalError(
                f"The gradient's norm is {norm}; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self._write_back()
        return norm

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """Moments, schedule and fp32 masters."""
        masters: list[Tensor] = [m.detach() for m in self.masters]
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "masters": masters,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the model's parameters are written from the masters."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * 2})
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
