"""Gearshift: align language models with reinforcement learning on one copy of the weights.

    from gearshift import train_rl
    result = train_rl("HuggingFaceTB/SmolLM2-135M-Instruct", prompts, reward, output="runs/x")

The names below are imported when they are first used, so that `import gearshift` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gearshift.batch import PackedBatch as PackedBatch
    from gearshift.batch import pack as pack
    from gearshift.data.chat import render_prompt as render_prompt
    from gearshift.data.sources import DataConfig as DataConfig
    from gearshift.data.sources import SourceConfig as SourceConfig
    from gearshift.engine import Engine as Engine
    from gearshift.engine import EngineConfig as EngineConfig
    from gearshift.environments.base import RowEnvironment as RowEnvironment
    from gearshift.environments.base import TextEnvironment as TextEnvironment
    from gearshift.errors import CapacityError as CapacityError
    from gearshift.errors import CheckpointError as CheckpointError
    from gearshift.errors import ConfigError as ConfigError
    from gearshift.errors import DataError as DataError
    from gearshift.errors import FolderInUseError as FolderInUseError
    from gearshift.errors import GearshiftError as GearshiftError
    from gearshift.errors import InterruptedRunError as InterruptedRunError
    from gearshift.errors import ModelError as ModelError
    from gearshift.errors import NumericalError as NumericalError
    from gearshift.errors import StorageError as StorageError
    from gearshift.models.adapters import AdapterConfig as AdapterConfig
    from gearshift.models.load import ModelConfig as ModelConfig
    from gearshift.pipeline.api import run as run
    from gearshift.pipeline.api import train_dpo as train_dpo
    from gearshift.pipeline.api import train_process_reward_model as train_process_reward_model
    from gearshift.pipeline.api import train_reward_model as train_reward_model
    from gearshift.pipeline.api import train_rl as train_rl
    from gearshift.pipeline.api import train_sft as train_sft
    from gearshift.pipeline.inference import evaluate as evaluate
    from gearshift.pipeline.inference import generate as generate
    from gearshift.pipeline.inference import load as load
    from gearshift.pipeline.inference import score as score
    from gearshift.pipeline.result import RunResult as RunResult
    from gearshift.rewards.config import RewardSource as RewardSource
    from gearshift.rollouts.evaluate import Evaluation as Evaluation
    from gearshift.runtime.optimizer import OptimizerConfig as OptimizerConfig
    from gearshift.tasks.rows import read_rows as read_rows
    from gearshift.tasks.rows import write_rows as write_rows
    from gearshift.tasks.task import Task as Task
    from gearshift.tasks.task import TaskConfig as TaskConfig
    from gearshift.trainers.preference import PreferenceConfig as PreferenceConfig
    from gearshift.trainers.process_reward_model import ProcessRewardConfig as ProcessRewardConfig
    from gearshift.trainers.reward_model import RewardModelConfig as RewardModelConfig
    from gearshift.trainers.rl.config import ImportanceConfig as ImportanceConfig
    from gearshift.trainers.rl.config import KLConfig as KLConfig
    from gearshift.trainers.rl.config import RLConfig as RLConfig
    from gearshift.trainers.rl.config import RolloutConfig as RolloutConfig
    from gearshift.trainers.rl.config import ShapingConfig as ShapingConfig
    from gearshift.trainers.rl.config import UpdateConfig as UpdateConfig
    from gearshift.trainers.sft import SFTConfig as SFTConfig
    from gearshift.types import Completion as Completion
    from gearshift.types import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "batch": ("PackedBatch", "pack"),
    "data.chat": ("render_prompt",),
    "data.sources": ("DataConfig", "SourceConfig"),
    "engine": ("Engine", "EngineConfig"),
    "environments.base": ("RowEnvironment", "TextEnvironment"),
    "errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "FolderInUseError",
        "GearshiftError",
        "InterruptedRunError",
        "ModelError",
        "NumericalError",
        "StorageError",
    ),
    "models.adapters": ("AdapterConfig",),
    "models.load": ("ModelConfig",),
    "pipeline.api": (
        "run",
        "train_dpo",
        "train_process_reward_model",
        "train_reward_model",
        "train_rl",
        "train_sft",
    ),
    "pipeline.inference": ("evaluate", "generate", "load", "score"),
    "pipeline.result": ("RunResult",),
    "rewards.config": ("RewardSource",),
    "rollouts.evaluate": ("Evaluation",),
    "runtime.optimizer": ("OptimizerConfig",),
    "tasks.rows": ("read_rows", "write_rows"),
    "tasks.task": ("Task", "TaskConfig"),
    "trainers.preference": ("PreferenceConfig",),
    "trainers.process_reward_model": ("ProcessRewardConfig",),
    "trainers.reward_model": ("RewardModelConfig",),
    "trainers.rl.config": (
        "ImportanceConfig",
        "KLConfig",
        "RLConfig",
        "RolloutConfig",
        "ShapingConfig",
        "UpdateConfig",
    ),
    "trainers.sft": ("SFTConfig",),
    "types": ("Completion", "SamplingParams"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
if not TYPE_CHECKING:
    # A type checker has the names from the imports above. It reads `__all__` only where that is a
    # literal, and with `__getattr__` it would accept any name.
    __all__ = ["__version__", *sorted(_MODULES)]

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
