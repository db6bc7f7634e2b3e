"""How much memory a stage will take, before it takes it; and the largest micro-batch that fits.

The prediction is a sum: weights, master weights, moments, gradients, cache, and a micro-batch's
forward and backward pass as `activations.py` measures it. `docs/performance.md` compares it with
measured peaks. This file knows no stage: `MemoryNeeds` says what a stage needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gearshift.engine import EngineConfig
from gearshift.engine.cache_size import gpu_cache_bytes, head_sizes, largest, position_bytes
from gearshift.pipeline.activations import Activations
from gearshift.runtime.allocator import resident_bytes
from gearshift.runtime.distributed import world
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.terminal import counted
from gearshift.trainers.needs import MemoryNeeds

GIB = 2**30
_PROGRAM = 0.47 * GIB
"""Bytes that Python and its libraries take in the host's memory."""
_SLACK = 0.1
"""The part that allocators lose between their blocks."""
_STEP = 4 << 25
"""Bytes of the gradient of one of the optimizer's buffers in fp32."""
_TRAINED_COPY = 1.6
"""Bytes that the weights of a trained model take on a CPU, over their own: the file that they were
read from stays mapped, and the allocator keeps what loading freed. Measured."""
_LOADED_COPY = 1.3
"""The same for a model that is only run. Measured."""
_LOGIT_BYTES = 6.0
"""Bytes of a decode step for one logit: in the model's dtype, and in fp32 to sample from."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part."""
    heads: int
    """Heads of queries, keys and values together."""
    head_size: int
    position_bytes: int
    """Bytes of the keys and values of one token in the cache."""
    vocabulary: int
    item: int
    """Bytes of a weight."""

    @staticmethod
    def of(model: PreTrainedModel, dtype: torch.dtype) -> Shape:
        """The shape of a model, which may be on the meta device."""
        config = model.config.get_text_config()
        heads, key_heads, head_size = head_sizes(config)
        return Shape(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=largest(config, "intermediate_size", 4 * config.hidden_size),
            heads=heads + 2 * key_heads,
            head_size=head_size,
            position_bytes=position_bytes(model, dtype.itemsize),
            vocabulary=config.vocab_size,
            item=dtype.itemsize,
        )

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.parameters * self.item

    def cache(self, rows: int, length: int) -> float:
        """Bytes of the keys and values of this many rows."""
        return float(self.position_bytes * rows * length)


def parts_of(
    needs: MemoryNeeds,
    engine: EngineConfig,
    shape: Shape,
    trained: int,
    device: torch.device,
    adapters: bool = False,
    total: float = 0.0,
) -> dict[str, float]:
    """Bytes of a stage by purpose, without activations. `trained` parameters learn; the device has
    `total` bytes (0: unknown).
    """
    on_cpu = device.type == "cpu"
    cut = _is_cut(needs)
    parts = _learning(shape, needs.optimizer, trained, device, cut)
    if on_cpu:
        parts["Python and its libraries"] = _PROGRAM
    if needs.rollout:
        sequences, length = needs.rollout
        rows = min(engine.max_num_seqs, sequences)
        allowed = 0.0 if on_cpu else gpu_cache_bytes(engine, shape.weights, total)
        parts.update(_cache(shape, engine, rows, length, max(0.0, allowed)))
        parts["logits of a decode step"] = _LOGIT_BYTES * rows * shape.vocabulary
        if on_cpu and engine.prepack_weights and shape.item == 2:
            parts["prepacked weights"] = float(shape.weights)
    if needs.reference and not adapters:
        parts["reference"] = _LOADED_COPY * shape.weights
    if needs.critic:
        critic = _learning(shape, needs.critic, shape.parameters, device, cut)
        parts["critic, its gradients and its optimizer"] = sum(critic.values())
    return parts


def _cache(
    shape: Shape, engine: EngineConfig, rows: int, length: int, allowed: float
) -> dict[str, float]:
    """Bytes of the cache. On a CPU it takes memory as it is written. A GPU gives it all at once:
    the `allowed` bytes, if the longest sequences can use them (`engine.cache_size`).
    """
    needed = shape.cache(rows, length)
    if (tokens := engine.kv_cache_tokens) is not None:
        given = shape.cache(1, tokens)
        return {f"KV cache of {tokens} tokens": given if allowed else min(given, needed)}
    if not allowed:
        return {f"KV cache of {counted(rows, 'row')} x {length} tokens": needed}
    longest = engine.max_length
    most = shape.cache(engine.max_num_seqs, longest) if longest else allowed
    return {"KV cache (engine.gpu_memory_utilization)": min(allowed, most)}


def _learning(
    shape: Shape, optimizer: OptimizerConfig, trained: int, device: torch.device, cut: bool
) -> dict[str, float]:
    """Bytes of a model that learns. `cut`: an update has several micro-batches, whose gradients are
    summed in fp32.
    """
    moments = 2 * trained * (1 if optimizer.moments == "8bit" else 4)
    ranks, sharded = world().size, world().sharded
    zero = world().deepspeed
    on_host = optimizer.offload == "always" or (zero is not None and zero.offload == "cpu")
    on_host = on_host and device.type != "cpu"
    return {
        "weights": (_TRAINED_COPY if device.type == "cpu" else 1.0) * shape.weights,
        "sums of gradients": 4.0 * trained / ranks if sharded else 4.0 * trained if cut else 0.0,
        "fp32 masters and moments": 0.0 if on_host else float(4 * trained + moments) / ranks,
        "the optimizer's step": float(min(_STEP, 4 * trained)),
    }


def passing(needs: MemoryNeeds, shape: Shape, trained: int, activations: float) -> float:
    """Bytes of a micro-batch's pass beside the sums of gradients: its activations, or the gradients
    that come as these go, in the weights' type; in fp32 gradients are summed where they are.
    """
    if _is_cut(needs) and shape.item == 4:
        return activations
    learned = trained + (shape.parameters if needs.critic else 0)
    return max(activations, float(learned * shape.item))


def _is_cut(needs: MemoryNeeds) -> bool:
    """Whether an update may have several micro-batches."""
    return not 0 < needs.update_tokens <= needs.micro_batch_tokens


def with_total(parts: dict[str, float]) -> dict[str, float]:
    """The parts, what allocators add to them, and their sum."""
    parts = {**parts, "held by allocators": _SLACK * sum(parts.values())}
    return {**parts, "total": sum(parts.values())}


def resident(device: torch.device) -> float:
    """Bytes that this process already holds on the device."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return resident_bytes()


def micro_batch(
    needs: MemoryNeeds,
    engine: EngineConfig,
    activations: Activations,
    parts: dict[str, float],
    free: float,
) -> tuple[int, bool]:
    """Tokens of a micro-batch, and whether layers are computed again in the backward pass.

    What the configs leave open (`micro_batch_tokens: 0`, `recompute: null`) is chosen: as many
    tokens as fit in nine tenths of `free` bytes, at most 65,536; and layers are computed again
    where the tokens asked for (or 4,096) would not fit otherwise.
    """
    asked, most = needs.micro_batch_tokens, needs.update_tokens
    room = 0.9 * free / (1 + _SLACK) - sum(parts.values())
    tokens = min(asked or 4096, most)
    again = engine.recompute
    if again is None:
        again = needs.head == "logprobs" and room < activations.bytes(tokens, False)
        again = again and activations.bytes(tokens, True) > 0  # not built for every model
    if asked:
        return tokens, again
    taken = activations.bytes(tokens, again)
    fitting = int(tokens * room / taken) if taken else tokens
    return max(1, min(most, 65_536, fitting)), again


def shortage(total: float, free: float, key: str) -> str:
    """A warning that the memory is less than the stage's predicted peak; empty if it is enough.
    `key` sets the stage's micro-batches.

    It is a warning and does not stop the run: the peak is an estimate, and other programs may end.
    """
    if total <= free:
        return ""
    return (
        f"it may take {total / GIB:.2f} GiB and {free / GIB:.2f} GiB are free; "
        f"lower {key} or engine.max_num_seqs, set engine.recompute=true, or take adapters "
        "(model.lora) or a smaller model"
    )
