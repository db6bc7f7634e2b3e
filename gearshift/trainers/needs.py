"""The needs of a stage by its config: what its memory depends on, and what it reads. The pipeline
plans with them and need not know which stage it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gearshift.data import DataConfig
from gearshift.data.labels import Format
from gearshift.runtime.optimizer import OptimizerConfig

PROMPT_TOKENS = 128
"""The assumed number of tokens of a prompt, before any is read."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The largest tree of sequences that a micro-batch has."""

    prompt: int
    """Tokens of the prompt that all continue; 0 for a single sequence."""
    completions: int
    length: int
    """Tokens of each completion."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What the memory of a stage depends on, besides its model."""

    optimizer: OptimizerConfig
    """The optimizer of the model that is trained."""
    micro_batch_tokens: int
    """Tokens of a micro-batch as the recipe has them; 0 leaves them to the memory."""
    update_tokens: int
    """Tokens of one update at most: no micro-batch is larger."""
    tree: Tree
    """What the micro-batches consist of."""
    head: Literal["logprobs", "scores", "token_logits"] = "logprobs"
    """What the model computes, by the name of the runner's method."""
    dropout: bool = False
    """Whether the model's dropout is on."""
    reference: bool = False
    """Whether a second copy of the policy is loaded, unless the policy has adapters."""
    critic: OptimizerConfig | None = None
    """The optimizer of a separate critic."""
    rollout: tuple[int, int] | None = None
    """(sequences, tokens of each) that this program samples for one update."""
    keep_whole: bool = True
    """Whether the whole model stays beside a copy that is split over the ranks."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage reads, by the names that a recipe has for it."""

    learned: tuple[DataConfig, ...] = ()
    """Rows that the model learns from."""
    heldout: tuple[DataConfig, ...] = ()
    """Rows that only measure it."""
    models: tuple[str, ...] = ()
    """Folders and names of models; `reward` is this run's reward model."""
    functions: tuple[str, ...] = ()
    """Functions of rewards, as `file.py:function` or `module:function`."""
    task: bool = False
    """Whether it reads the training rows of the recipe's task."""
    labels: Format = "messages"
    """The format in which it reads labels of people."""
