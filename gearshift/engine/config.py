"""Bounds of the engine, as a recipe writes them."""

from __future__ import annotations

from pydantic import Field

from gearshift.kernels.specs import BLOCK
from gearshift.runtime.config import Config


class EngineConfig(Config):
    """Sizes of the engine, and what it may trade."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Completions that decode together."""
    max_length: int | None = Field(default=None, ge=2)
    """The longest prompt plus completion, in tokens; null takes the model's."""
    max_num_batched_tokens: int = Field(default=4096, ge=1)
    """Prompt tokens that one prefill computes together."""
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose keys and values the cache holds at most. Null makes room for `max_num_seqs` of
    the longest requests; a GPU has `gpu_memory_utilization` for them. With less room, sequences
    wait or are computed again.
    """
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """The share of a GPU's whole memory that the weights and the cache take together. The cache is
    allocated once, at the first generation, and no larger than `max_num_seqs` of the longest
    sequences. Training has what is left. A CPU ignores this key, and so does a cache of
    `kv_cache_tokens`.
    """
    free_cache_while_training: bool = False
    """Free the memory of the cache and of the prepacked weights at each shift to training."""
    recompute: bool | None = None
    """Keep only the input of each layer in a training forward, and compute the layer again in the
    backward pass (activation checkpointing). This costs a third more work and saves most of the
    memory of activations. Only described architectures have it; others are refused. Null: a recipe
    switches it on if one micro-batch does not fit without it.
    """
    decode_steps_per_sync: int | None = Field(default=None, ge=1, le=BLOCK)
    """Tokens that each sequence samples between two checks of the scheduler. What a sequence
    samples after its end is thrown away, but a GPU does not wait for the scheduler. Null takes 8 on
    a GPU and 1 on a CPU.
    """
    capture_steps: bool = True
    """Capture each decode step once and replay it: as a CUDA graph on a GPU, as a list of kernel
    calls on a CPU. False makes all calls anew for each token, which is slower.
    """
    prepack_weights: bool = True
    """Multiply by a copy of the weights in the CPU's own layout, made anew for each version of the
    weights, where that is faster (bf16 on a CPU that multiplies bf16).
    """
