"""Bounds of the engine, as a recipe writes them."""

from __future__ import annotations

from pydantic import Field

from gearshift.kernels.specs import BLOCK
from gearshift.runtime.config import Config


class EngineConfig(Config):
    """Sizes of the engine, and what it may trade."""

    max_num_seqs: int = Field(default=64, ge=1)
    """How many completions are decoded at the same time, at most."""
    max_length: int | None = Field(default=None, ge=2)
    """The largest length of a prompt with its completion, in tokens; null is the model's own limit.
    """
    max_num_batched_tokens: int = Field(default=4096, ge=1)
    """How many prompt tokens one prefill computes, at most. A longer prompt is computed in pieces.
    """
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """How many tokens the cache of keys and values holds, at most. null is enough for
    `max_num_seqs` of the longest requests; on a GPU `gpu_memory_utilization` limits it. With a
    smaller cache, sequences wait or are computed again."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """The share of a GPU's whole memory that the weights and the cache take together; training has
    the rest. null gives the cache 0.3 of what the weights leave. The cache is allocated once, at
    the first generation, and is at most as large as `max_num_seqs` of the longest sequences. The
    key has no effect on a CPU, or with `kv_cache_tokens`."""
    free_cache_while_training: bool = False
    """Whether the memory of the cache, of captured steps and of the prepacked weights is freed
    before each training phase. They are made again at the next generation."""
    recompute: bool | None = None
    """Whether training keeps only the input of each layer, and computes the layer again in the
    backward pass (activation checkpointing). This costs a third more work and saves most of the
    memory of activations. A model that runs through Hugging Face's own forward cannot do it, and is
    refused. null: a recipe switches it on if one micro-batch does not fit into the memory without
    it."""
    decode_steps_per_sync: int | None = Field(default=None, ge=1, le=BLOCK)
    """How many tokens each sequence samples between two checks of the scheduler. Tokens after the
    end of a sequence are discarded, but a GPU does not wait for the scheduler. null is 8 on a GPU
    and 1 on a CPU."""
    capture_steps: bool = True
    """Whether each decode step is captured once and replayed: as a CUDA graph on a GPU, as a list
    of kernel calls on a CPU. Without it all calls are made again for each token, which is slower.
    """
    prepack_weights: bool = True
    """Whether generation on a CPU uses a copy of the weights in the CPU's own layout, where that is
    faster (bfloat16 on a CPU that multiplies bfloat16). The copy is made again after each update.
    """
