"""How much memory a stage will take, before it takes it; and the largest micro-batch that fits.

The prediction is a sum: weights, master weights, moments, gradients, cache, and a micro-batch's
forward and backward pass as `activations.py` measures it. `docs/performance.md` compares it with
measured peaks, `docs/scale.md` has the formulas for several ranks. This file knows no stage:
`MemoryNeeds` says what a stage needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from gearshift.engine import EngineConfig
from gearshift.engine.cache_size import gpu_cache_bytes, head_sizes, largest, position_bytes
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.machine import GIB, Machine
from gearshift.runtime.distributed import world
from gearshift.runtime.flat import LARGEST
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.terminal import counted
from gearshift.trainers.needs import MemoryNeeds

_PROGRAM = 0.47 * GIB
"""Bytes that Python and its libraries take in the host's memory."""
_SLACK = 0.1
"""The part that allocators lose between their blocks."""
_TRAINED_COPY = 1.6
"""Bytes that the weights of a trained model take on a CPU, over their own: the file that they were
read from stays mapped, and the allocator keeps what loading freed. Measured."""
_LOADED_COPY = 1.3
"""The same for a model that is only run. Measured."""
_LOGIT_BYTES = 6.0
"""Bytes of a CPU's decode step for one logit: in the model's dtype, and in fp32 to sample from."""
_SAMPLED_BYTES = 13.0
"""Bytes that a GPU's decode step needs to sample from one logit, besides the logit. Measured."""


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
    tables: int = 0
    """Parameters of the embedding and of a head that is not the embedding."""
    widest: int = 0
    """Parameters of the largest single weight."""

    @staticmethod
    def of(model: PreTrainedModel, dtype: torch.dtype) -> Shape:
        """The shape of a model, which may be on the meta device."""
        config = model.config.get_text_config()
        heads, key_heads, head_size = head_sizes(config)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = {id(end.weight): end.weight.numel() for end in ends if end is not None}
        if config.tie_word_embeddings:
            tables = dict([*tables.items()][:1])
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
            tables=sum(tables.values()),
            widest=max(p.numel() for p in model.parameters()),
        )

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.parameters * self.item

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return (self.parameters - self.tables) // self.layers

    def cache(self, rows: int, length: int) -> float:
        """Bytes of the keys and values of this many rows."""
        return float(self.position_bytes * rows * length)


def parts_of(
    needs: MemoryNeeds,
    engine: EngineConfig,
    shape: Shape,
    trained: int,
    machine: Machine,
    adapters: bool = False,
) -> dict[str, float]:
    """Bytes of a stage on one rank by purpose, without activations. `trained` parameters learn;
    with `adapters` they are the adapters'.
    """
    on_cpu = machine.device.type == "cpu"
    cut = _is_cut(needs)
    whole = needs.keep_whole
    parts = _learning(shape, needs.optimizer, trained, machine, cut, adapters, whole)
    if on_cpu:
        parts["Python and its libraries"] = _PROGRAM
    if not engine.free_cache_while_training:
        parts |= _generating(needs, engine, shape, machine)
    if needs.reference and not adapters:
        parts["reference"] = (_LOADED_COPY if on_cpu else 1.0) * shape.weights
        if machine.split > 1 and not whole:
            parts["reference"] = 4 * shape.parameters / machine.split
    if needs.critic:
        critic = _learning(shape, needs.critic, shape.parameters, machine, cut, False, whole)
        parts["critic, its gradients and its optimizer"] = sum(critic.values())
    return parts


def _generating(
    needs: MemoryNeeds, engine: EngineConfig, shape: Shape, machine: Machine
) -> dict[str, float]:
    """Bytes that only generation needs, by purpose."""
    if not needs.rollout:
        return {}
    on_cpu = machine.device.type == "cpu"
    sequences, length = needs.rollout
    rows = min(engine.max_num_seqs, sequences)
    allowed = 0.0 if on_cpu else gpu_cache_bytes(engine, shape.weights, machine.total)
    parts = _cache(shape, engine, rows, length, max(0.0, allowed))
    logit = _LOGIT_BYTES if on_cpu else _SAMPLED_BYTES + shape.item
    parts["logits of a decode step"] = logit * rows * shape.vocabulary
    if on_cpu and engine.prepack_weights and shape.item == 2:
        parts["prepacked weights"] = float(shape.weights)
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
    shape: Shape,
    optimizer: OptimizerConfig,
    trained: int,
    machine: Machine,
    cut: bool,
    adapters: bool,
    whole: bool,
) -> dict[str, float]:
    """Bytes of a model that learns. `cut`: an update has several micro-batches, whose gradients are
    summed in fp32. `whole`: it stays beside its copy that is split.

    While a step sums the gradients over the ranks, each buffer of them shrinks to this rank's part,
    so these parts never add to the peak.
    """
    on_cpu, split = machine.device.type == "cpu", 1 if adapters else machine.split
    state = trained / machine.ranks if split == 1 else trained / split
    on_host = (optimizer.offload == "always" or machine.state_on_host) and not on_cpu
    parts = {
        "weights": (_TRAINED_COPY if on_cpu else 1.0) * shape.weights,
        "fp32 masters": 0.0 if on_host else 4 * state,
        "moments": 0.0 if on_host else 2 * state * (1 if optimizer.moments == "8bit" else 4),
    }
    if split > 1:
        # The embedding and the head stay whole from the forward to the backward pass; of the
        # layers there are two, with one's gradient in both precisions.
        layer = (3 * shape.item + 4) * shape.layer
        parts["weights gathered while training"] = 2.0 * shape.item * shape.tables + layer
        if not whole:
            del parts["weights"]
        return {**parts, "sums of gradients": 4 * state}
    # One buffer's whole gradient, and what the ranks' sum of it takes.
    buffer = 4.0 * min(max(LARGEST, shape.widest), trained)
    parts["the optimizer's step"] = buffer * (1 + 2 / machine.ranks * (machine.ranks > 1))
    return {**parts, "sums of gradients": 4.0 * trained if cut else 0.0}


def passing(
    needs: MemoryNeeds, shape: Shape, trained: int, activations: float, split: bool = False
) -> dict[str, float]:
    """Bytes of a micro-batch's pass beside the sums of gradients, by purpose: gradients that come
    in the weights' type as activations go, and what activations take beyond them. In fp32,
    gradients are summed where they are. With `split` those of embedding and head come, in fp32.
    """
    if split:
        gradients = 4.0 * shape.tables * (2 if needs.critic else 1)
    elif _is_cut(needs) and shape.item == 4:
        gradients = 0.0
    else:
        gradients = float(shape.item * (trained + (shape.parameters if needs.critic else 0)))
    return {"gradients": gradients, "activations": max(0.0, activations - gradients)}


def _of_one_rank(needs: MemoryNeeds, ranks: int) -> MemoryNeeds:
    """The needs of one rank: its part of an update and of a rollout."""
    rollout = needs.rollout and (-(-needs.rollout[0] // ranks), needs.rollout[1])
    return replace(needs, update_tokens=-(-needs.update_tokens // ranks), rollout=rollout)


def _is_cut(needs: MemoryNeeds) -> bool:
    """Whether an update may have several micro-batches."""
    return not 0 < needs.update_tokens <= needs.micro_batch_tokens


def with_total(parts: dict[str, float]) -> dict[str, float]:
    """The parts, what allocators add to them, and their sum."""
    parts = {**parts, "held by allocators": _SLACK * sum(parts.values())}
    return {**parts, "total": sum(parts.values())}


@dataclass(frozen=True)
class Fitted:
    """The sizes of a stage, and the memory that it takes with them."""

    tokens: int
    """How many tokens a micro-batch has."""
    recompute: bool
    """Whether layers are computed again in the backward pass."""
    parts: dict[str, float]
    """Bytes of one rank by purpose, with their sum."""


def fit(
    needs: MemoryNeeds,
    engine: EngineConfig,
    shape: Shape,
    trained: int,
    machine: Machine,
    activations: Activations,
    adapters: bool,
) -> Fitted:
    """What the configs leave open, chosen for the machine: the same on all ranks, for the one that
    has the least memory.
    """
    needs = _of_one_rank(needs, machine.ranks)
    parts = parts_of(needs, engine, shape, trained, machine, adapters)
    chosen = micro_batch(needs, engine, activations, parts, machine.free)
    fitted = world().gather(chosen, "the size of micro-batches")
    tokens, again = min(t for t, _ in fitted), any(r for _, r in fitted)
    split = machine.split > 1 and not adapters
    found = passing(needs, shape, trained, activations.bytes(tokens, again), split)
    what = f"activations of {tokens} tokens{', computed again' if again else ''}"
    unknown = f" (not measured: {activations.unknown})" if activations.unknown else ""
    parts["gradients"] = found["gradients"]
    parts[what + unknown] = found["activations"]
    if machine.split > 1 and not adapters and not needs.keep_whole:
        # Each unit of the whole model goes as its rows come; the moments come later.
        room = shape.weights + 4.0 * max(shape.layer, shape.tables)
        parts["the whole model while it is split, where it takes more"] = max(
            0.0, room - sum(parts.values())
        )
    if engine.free_cache_while_training:
        passes = ("gradients", "sums of gradients", "the optimizer's step", what + unknown)
        there = sum(parts.get(name, 0.0) for name in passes)
        room = sum(_generating(needs, engine, shape, machine).values())
        parts["cache, where it takes more than training"] = max(0.0, room - there)
    return Fitted(tokens, again, with_total(parts))


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
