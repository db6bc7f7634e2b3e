"""The machine that memory is planned for: this one, or another one by name. It must not import a
stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gearshift.errors import ConfigError
from gearshift.runtime.allocator import resident_bytes
from gearshift.runtime.distributed import World, world
from gearshift.runtime.free_memory import free_bytes, total_bytes
from gearshift.runtime.scale_config import ScaleConfig

GIB = 2**30
_LIBRARIES = 1.0 * GIB
"""Bytes of a GPU that CUDA and NCCL take for themselves. Assumed, not measured."""


@dataclass(frozen=True)
class Machine:
    """What one rank has for itself, and how many ranks share the work."""

    device: torch.device
    free: float = math.inf
    """Bytes that the rank can take."""
    total: float = 0.0
    """Bytes that its device has; 0: unknown."""
    ranks: int = 1
    """How many processes the run has."""
    split: int = 1
    """Over how many of them a model that is trained is split; 1: it is whole on each."""
    state_on_host: bool = False
    """Whether masters and moments are in the host's memory (`scale.deepspeed.offload`)."""

    @staticmethod
    def here(device: torch.device) -> Machine:
        """This rank's device; its free memory counts what this process holds by now."""
        held, ranks = resident(device), world()
        free, total = free_bytes(device) + held, total_bytes(device)
        on_host = ranks.deepspeed is not None and ranks.deepspeed.offload == "cpu"
        return Machine(device, free, total, ranks.size, ranks.split, on_host)

    @staticmethod
    def named(name: str, scale: ScaleConfig) -> Machine:
        """The machine that a name such as `4x8x79` means: nodes x GPUs of each x GiB of a GPU.
        Raises `ConfigError` for other text.
        """
        try:
            nodes, gpus, gib = (float(part) for part in name.lower().split("x"))
        except ValueError:
            nodes = gpus = gib = 0.0
        ranks = int(nodes) * int(gpus)
        if ranks < 1 or gib <= 0 or ranks != nodes * gpus:
            raise ConfigError(
                f"--on {name} names no machine; give nodes x GPUs of each x GiB of a GPU, such as "
                "4x8x79."
            )
        zero = scale.deepspeed if scale.strategy == "deepspeed" else None
        sharded = ranks > 1 and (scale.strategy == "fsdp" or (zero is not None and zero.stage == 3))
        world = World(0, ranks, sharded=sharded, group=scale.split, deepspeed=zero)
        split = world.split_over(int(gpus))
        on_host = zero is not None and zero.offload == "cpu"
        total = gib * GIB
        return Machine(torch.device("cuda"), total - _LIBRARIES, total, ranks, split, on_host)


def resident(device: torch.device) -> float:
    """Bytes that this process already holds on the device."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return resident_bytes()
