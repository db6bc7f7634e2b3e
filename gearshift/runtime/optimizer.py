"""AdamW with fp32 master weights: the optimizer keeps full precision, the model keeps the precision
it runs in.

In bf16 alone, an update of 1e-6 on a weight of 0.1 is lost; the master weight keeps it until it
counts. Master weights and moments are flat buffers: one pass for the norm, then for each buffer its
gradient in fp32 and a fused update. The buffers are bounded, so no complete fp32 copy of a
micro-batch's gradient exists. They are few, so they can be moved when the device's memory is needed
for something else. Gradients of several micro-batches are summed in fp32, because in bf16 a small
one is lost beside the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from transformers import get_scheduler

from gearshift.errors import ConfigError, NumericalError
from gearshift.runtime.config import Config
from gearshift.runtime.distributed import Part, world
from gearshift.runtime.flat import BLOCK, Flat, flats_of, squares
from gearshift.runtime.sharded_parameter import ShardedParameter
from gearshift.runtime.transfers import Staging, Transfers


class OptimizerConfig(Config):
    """AdamW, its learning-rate schedule, and gradient clipping."""

    lr: float = Field(default=1e-5, gt=0)
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's beta1 and beta2: the decay of its averages of the gradient and of the squared
    gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """A small number that Adam adds to the denominator of an update."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; it applies to matrices only, never to norms and biases."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A gradient with a larger norm is scaled down to this norm."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = (
        "constant_with_warmup"
    )
    """How the learning rate changes after the warm-up."""
    warmup: int = Field(default=0, ge=0)
    """How many steps the learning rate takes to rise linearly from 0 to its peak; the schedule
    `constant` has no such steps."""
    moments: Literal["float32", "8bit"] = "float32"
    """The precision of Adam's moments; `8bit` (Dettmers et al. 2022; it needs torchao) takes a
    quarter of the memory.
    """
    offload: Literal["never", "while_generating", "always"] = "never"
    """When the master weights and Adam's moments are in the host's memory instead of the GPU's:
    `while_generating` moves them there while the policy generates; `always` also computes the
    update there. Without a GPU the key has no effect.
    """

    @field_validator("warmup")
    @classmethod
    def _is_used(cls, warmup: int, info: ValidationInfo) -> int:
        if warmup and info.data.get("schedule") == "constant":
            raise ValueError(
                "schedule=constant does not read it; leave it out, or take constant_with_warmup."
            )
        return warmup


class MasterAdamW:
    """AdamW over a flat fp32 copy of the model's parameters, of which each rank holds and updates
    its part.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, total_steps: int
    ) -> None:
        """Raises `ConfigError` where 8-bit moments are asked for without torchao."""
        self.begun = 0
        """How many updates have begun to write, whether or not they came to their end."""
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config = config
        place, always = self.parameters[0].device, config.offload == "always"
        self.device = torch.device("cpu") if always else place
        offloads = config.offload != "never" and place.type == "cuda"
        self.transfers = Transfers(place) if offloads else None
        self._host: dict[tuple[int, str, str], Tensor] = {}
        """The host's memory that each part of the state is moved to, the same each time."""
        self._away = False
        """Whether the state is in the host's memory until the next step."""
        staging = Staging(self.transfers) if self.transfers and always else None
        decayed = flats_of([p for p in self.parameters if p.ndim >= 2], self.device, staging)
        plain = flats_of([p for p in self.parameters if p.ndim < 2], self.device, staging)
        self.flats = [*decayed, *plain]
        self._turns: list[list[Flat | ShardedParameter]] = [
            [flat] for flat in self.flats if isinstance(flat, Flat)
        ]
        """What an update writes at once: the gradients of what is split are there already."""
        if split := [flat for flat in self.flats if isinstance(flat, ShardedParameter)]:
            self._turns.append([*split])
        groups = [
            {"params": [flat.master for flat in decayed], "weight_decay": config.weight_decay},
            {"params": [flat.master for flat in plain], "weight_decay": 0.0},
        ]
        self.optimizer = _adamw(config)(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps
        )
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, config.warmup, max(1, total_steps)
        )

    def accumulate(self) -> None:
        """Add the gradients of one of several micro-batches to sums in fp32."""
        for flat in self.flats:
            flat.accumulate()

    def norm(self) -> float:
        """The gradient's norm, that of the ranks' sum. Raises `NumericalError` if it is not
        finite.
        """
        if world().size > 1:
            for flat in self.flats:
                flat.share()
        sums = [flat.sums for flat in self.flats if flat.sums is not None]
        grads = [*sums, *(p.grad for p in self.parameters if p.grad is not None)]
        norm = 0.0
        if grads:
            parts = torch.stack([squares(g).to(self.parameters[0].device) for g in grads])
            if world().size > 1:
                # What several ranks hold alike counts once.
                shares = torch.tensor([1.0 / flat.copies for flat in self.flats])
                parts = world().sum((parts * shares.to(parts.device)).sum())
            norm = float(parts.sum().sqrt())
        if not norm < float("inf"):
            raise NumericalError(
                f"The gradient's norm is {norm}; nothing was updated. Lower lr, "
                "or look for a bad reward or row."
            )
        return norm

    def drop_gradients(self) -> None:
        """Forget the gradients when no step will follow."""
        for flat in self.flats:
            flat.sums = None
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, norm: float | None = None) -> float:
        """Clip, update, write the model's parameters in place, clear the gradients, and return the
        norm before the clip (computed here, unless it is given).

        Raises `NumericalError`, and writes nothing, if a gradient is not finite.
        """
        if norm is None:
            try:
                norm = self.norm()
            except NumericalError:
                self.drop_gradients()
                raise
        self._bring_back()
        scale = min(1.0, self.config.max_grad_norm / max(norm, 1e-30))
        self.begun += 1
        self._write(scale)
        return norm

    def _write(self, scale: float) -> None:
        """Update by the gradients times `scale`, and write the model's parameters."""
        for flats in self._turns:
            for flat in flats:
                flat.master.grad = flat.gather(scale)
            self.optimizer.step()  # it updates these only: the others have no gradient
            for flat in flats:
                flat.master.grad = None
                flat.scatter()
        self.schedule.step()

    def offload_state(self) -> None:
        """Begin to move the state to the host's memory while the policy generates, if the config
        says so; `step` moves it back.
        """
        if self.config.offload == "while_generating" and self.transfers and not self._away:
            self._move(self.transfers, to_host=True)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def nbytes(self) -> int:
        """The bytes of the master weights and moments."""
        moments = (x for state in self.optimizer.state.values() for x in state.values())
        held = [
            *(flat.master for flat in self.flats),
            *(x for x in moments if isinstance(x, Tensor)),
        ]
        return sum(part.nbytes for x in held for part in _plain(x).values())

    def state_dict(self) -> dict[str, Any]:
        """The moments, the schedule and the fp32 master weights."""
        if self.transfers:
            self.transfers.wait()
        state = self.optimizer.state_dict()
        moments = {
            str(i): {k: self._saved(int(i), x) for k, x in kept.items()}
            for i, kept in state["state"].items()
        }
        return {
            "moments": moments,
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "masters": [flat.saved(flat.master.detach()) for flat in self.flats],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state, and write the model's parameters from the master weights."""
        self._bring_back()
        masters = [x.own if isinstance(x, Part) else x for x in state["masters"]]
        state = {**state, "masters": masters}
        if world().size == 1 and any(master.ndim != 1 for master in masters):
            state = self._joined(state)
        now = self.optimizer.state_dict()
        now["state"] = {
            int(i): {k: self._loaded(int(i), x) for k, x in kept.items()}
            for i, kept in state["moments"].items()
        }
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * 2})
        for group, rate in zip(now["param_groups"], self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(now)
        with torch.no_grad():
            for flat, saved in zip(self.flats, state["masters"], strict=True):
                flat.master.copy_(flat.loaded(saved))
                flat.scatter()

    def _joined(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer whose parameters were split over ranks: there, each parameter
        was a buffer of its own.
        """
        sizes = [sum(p.numel() for p in flat.parameters) for flat in self.flats]

        def join(parts: list[Tensor]) -> list[Tensor]:
            return list(torch.cat([part.flatten() for part in parts]).split(sizes))

        each = [state["moments"][str(i)] for i in range(len(state["moments"]))]
        moments: dict[str, dict[str, Any]] = {}
        for name, first in each[0].items() if each else ():
            parts = [first[""]] * len(sizes)  # a count of steps
            if first[""].ndim:
                parts = join([kept[name][""] for kept in each])
            for i, part in enumerate(parts):
                moments.setdefault(str(i), {})[name] = {"": part}
        return {**state, "moments": moments, "masters": join(state["masters"])}

    def _saved(self, i: int, x: Any) -> Any:
        """A part of the state of flat `i` for a checkpoint."""
        if not isinstance(x, Tensor):
            return x
        parts = _plain(x)
        if len(parts) == 1:
            of_flat = self.flats[i].saved
            return {k: of_flat(part) if part.ndim else part for k, part in parts.items()}
        # Blocks of 8-bit moments are this rank's own.
        return {k: Part(part, None) if part.ndim else part for k, part in parts.items()}

    def _loaded(self, i: int, x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        parts = {name: p.own if isinstance(p, Part) else p for name, p in x.items()}
        if len(parts) == 1:
            parts = {k: self.flats[i].loaded(p) if p.ndim else p for k, p in parts.items()}
        return _whole(parts)

    def _bring_back(self) -> None:
        if self._away and self.transfers:
            self._move(self.transfers, to_host=False)

    def _move(self, transfers: Transfers, to_host: bool) -> None:
        """Queue the moves of master weights and moments to the host's memory, or back."""

        def moved(x: Tensor, *key: Any) -> Tensor:
            parts = _plain(x)
            for name, part in parts.items():
                if not part.ndim:  # a flag of a quantised tensor
                    continue
                if to_host and (*key, name) not in self._host:
                    buffer = transfers.host_buffer(part.numel(), part.dtype)
                    self._host[*key, name] = buffer.view(part.shape)
                there = self._host[*key, name]
                parts[name] = there if to_host else torch.empty_like(part, device=self.device)
                transfers.copy(parts[name], part)
            return _whole(parts)

        for i, flat in enumerate(self.flats):
            flat.master.data = moved(flat.master.data, i, "master")
            state = self.optimizer.state[flat.master]
            for name, x in state.items():
                if isinstance(x, Tensor) and x.ndim:
                    state[name] = moved(x, i, name)
        transfers.join()
        self._away = to_host


def _adamw(config: OptimizerConfig) -> Any:
    if config.moments == "float32":
        return lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "moments=8bit needs torchao; pip install 'gearshift[torchao]', or take float32."
        ) from None
    return lambda groups, **options: AdamW8bit(groups, block_size=BLOCK, **options)


def _plain(x: Tensor) -> dict[str, Tensor]:
    """The plain tensors inside a quantised one, which a file can hold."""
    if type(x) is Tensor or isinstance(x, nn.Parameter):
        return {"": x.detach()}
    names, attributes = x.__tensor_flatten__()  # type: ignore[attr-defined]
    signed = torch.tensor(bool(attributes[0]))
    return {**{name: getattr(x, name).detach() for name in names}, "signed": signed}


def _whole(parts: dict[str, Tensor]) -> Tensor:
    """The inverse of `_plain`."""
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    quantised: Tensor = OptimState8bit(
        parts["codes"], parts["scale"], parts["qmap"], bool(parts["signed"])
    )
    return quantised
