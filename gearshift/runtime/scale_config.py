"""The keys of a run on several processes. It must not import what runs there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from pydantic import Field

from gearshift.runtime.config import Config, Neutral
from gearshift.runtime.deepspeed_config import DeepSpeedConfig


class ScaleConfig(Config):
    """How a run uses several processes; torchrun or Ray starts them."""

    strategy: Literal["replicate", "fsdp", "deepspeed"] = "replicate"
    """Where weights, gradients and the optimizer's state are. `replicate`: each rank has the whole
    weights and gradients, and its part of the master weights and moments. `fsdp`: each rank has its
    part of all of these (FSDP2), and beside them the whole weights to generate with. A policy with
    `model.lora` is not split. `deepspeed`: DeepSpeed's ZeRO keeps it, with stages 1 and 2
    where `replicate` has it and with stage 3 where `fsdp` has it, also in the host's memory.
    One process ignores the key.
    """
    split: int | None = Field(default=None, ge=2)
    """Over how many ranks `fsdp` splits a model; each group of so many ranks has all parts. null
    is the ranks of one node, which sends less between nodes. If the number of ranks is no multiple
    of it, all ranks have one set of parts.
    """
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """DeepSpeed's settings, with `strategy: deepspeed`."""
    timeout: Neutral[float] = Field(default=3600.0, gt=0)
    """How many seconds a rank waits for another one before the run ends."""

    @classmethod
    def unused(cls, tree: dict[str, Any]) -> dict[tuple[str, ...], str]:
        """The settings of another strategy."""
        readers, own = {"split": "fsdp", "deepspeed": "deepspeed"}, tree.get("strategy")
        given = [key for key, reader in readers.items() if tree.get(key) and own != reader]
        with suppress(ValueError):  # the section itself says what is wrong with it
            if DeepSpeedConfig.model_validate(tree.get("deepspeed") or {}) == DeepSpeedConfig():
                given = [key for key in given if key != "deepspeed"]  # a run's own recipe has it
        return {
            (key,): f"strategy is not {readers[key]}; set it, or leave {key} out." for key in given
        }
