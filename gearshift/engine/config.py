"""Bounds of the engine, as a recipe writes them."""

from __future__ import annotations

from pydantic import Field

from gearshift.kernels.specs import BLOCK
from gearshift.runtime.config import Config


class EngineConfig(Config):
    """Bounds of the generation gear."""

    max_num_seqs: int = Field(64, ge=1)
    """Completions that decode together."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt plus completion; None takes the model's."""
    max_num_batched_tokens: int = Field(4096, ge=1)
    """Prompt tokens that one prefill computes together."""
    kv_cache_tokens: int | None = Field(None, ge=1)
    """Tokens whose keys and values the cache holds at most; None makes room for `max_num_seqs` of
    the longest requests at hand. With less room, sequences wait or are computed again.
    """
    free_cache_while_training: bool = False
    """Give the memory of the cache and of the prepacked weights back at each shift to training."""
    recompute: bool | None = None
    """Keep only each layer's input of a training forward, and compute the layer again in the
    backward pass (activation checkpointing): a third more work, several times less memory. For
    described architectures; refused for others. None: a recipe does where one micro-batch would not
    fit else; off otherwise.
    """
    decode_steps_per_sync: int | None = Field(None, ge=1, le=BLOCK)
    """Tokens that each row samples before the scheduler looks at them: what a row samples beyond
    its end is thrown away, but a GPU need not wait for the scheduler. None: 8 on a GPU, 1 on a CPU.
    """
    prepack_weights: bool = True
    """Multiply by a copy of the weights in the CPU's own layout, made anew for each version, where
    that is faster (bf16 on a CPU that multiplies bf16).
    """
