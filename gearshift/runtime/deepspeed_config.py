"""The keys of DeepSpeed, which settings of its JSON file may be merged in, and the library itself.
Nothing imports DeepSpeed before a run needs it: recipes are read where it is not installed.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator, model_validator

from gearshift.errors import ConfigError
from gearshift.runtime.config import Config, PathText
from gearshift.runtime.terminal import one_line

_OWN = {
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.lr, optimizer.betas, optimizer.eps and optimizer.weight_decay",
    "scheduler": "optimizer.schedule and optimizer.warmup",
    "train_batch_size": "batch_size, or rl.rollout.prompts and rl.update.minibatches",
    "train_micro_batch_size_per_gpu": "micro_batch_tokens",
}
"""What a DeepSpeed file may say and the recipe decides, with the recipe's keys."""
_MERGED = {
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
}
_MERGED_ZERO = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage",
}


class DeepSpeedConfig(Config):
    """How DeepSpeed keeps the optimizer's state, with `strategy: deepspeed`."""

    stage: Literal[1, 2, 3] = 2
    """DeepSpeed's ZeRO stage. In all of them, each rank keeps its part of the master weights and
    Adam's moments. With 1 and 2, the gradients are whole on each rank until the update, which
    reduces them once. With 3, each rank keeps its part of the trained weights and of the gradients,
    and beside them the whole weights to generate with; a policy with `model.lora` is not split.
    """
    offload: Literal["none", "cpu"] = "none"
    """Whether master weights and moments are in the GPU's memory, or in the host's (`cpu`), where
    the update is then computed too.
    """
    config: PathText | None = None
    """A JSON file of DeepSpeed whose settings are merged in, such as `communication_data_type` and
    the sizes of buckets in `zero_optimization`; what other keys of the recipe decide is refused.
    """

    @field_validator("stage", mode="before")
    @classmethod
    def _is_built(cls, stage: Any) -> Any:
        if str(stage) == "0":
            raise ValueError("ZeRO-0 splits nothing; take stage 1, or strategy=replicate.")
        return stage

    @model_validator(mode="after")
    def _is_merged(self) -> DeepSpeedConfig:
        self.settings()
        return self

    def settings(self) -> dict[str, Any]:
        """The settings of the JSON file. Raises `ValueError` for a file that cannot be read, and
        for a setting that the recipe decides or that is not supported.
        """
        if self.config is None:
            return {}
        try:
            tree = json.loads(Path(self.config).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.config} cannot be read as JSON ({one_line(str(error), 200)}); name a "
                "DeepSpeed file, or leave `config` out."
            ) from None
        zero = tree.get("zero_optimization", {}) if isinstance(tree, dict) else None
        if not isinstance(zero, dict):
            raise ValueError(
                f"{self.config} is not a DeepSpeed file, which is a mapping of settings; name "
                "another one."
            )
        for name in sorted(tree.keys() - _MERGED - {"zero_optimization"}):
            self._refuse(name, _OWN.get(name, ""))
        for name in sorted(zero.keys() - _MERGED_ZERO):
            self._refuse(f"zero_optimization.{name}", "")
        if zero.get("stage", self.stage) != self.stage:
            self._refuse("zero_optimization.stage", "scale.deepspeed.stage")
        offload = zero.get("offload_optimizer") or {"device": self.offload}
        if offload.get("device", "none") != self.offload:
            self._refuse("zero_optimization.offload_optimizer", "scale.deepspeed.offload")
        return tree

    def _refuse(self, name: str, ours: str) -> None:
        if name == "data_types":
            why = "DeepSpeed counts gradients twice with `grad_accum_dtype: fp32`"
        else:
            why = (
                f"{ours} {'decide' if ' and ' in ours else 'decides'} this"
                if ours
                else "Gearshift does not support it"
            )
        raise ValueError(f"{self.config} sets `{name}`, and {why}; take it out of the file.")


def require_deepspeed() -> Any:
    """The library. Raises `ConfigError` where it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "scale.strategy=deepspeed needs DeepSpeed; pip install 'gearshift[deepspeed]', or take "
            "strategy=replicate."
        ) from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
