"""What a recipe would do, and the memory that it would take: `--dry-run`. It loads configs and
shapes, no weights; `memory.py` predicts the memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from gearshift.models.adapters import AdapterConfig
from gearshift.models.load import resolve_device, resolve_dtype
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.forms import forms, shapes
from gearshift.pipeline.memory import (
    GIB,
    Shape,
    micro_batch,
    parts_of,
    passing,
    shortage,
    with_total,
)
from gearshift.pipeline.recipe import POLICIES, STAGES, Recipe
from gearshift.runtime.config import dump
from gearshift.runtime.free_memory import free_bytes, total_bytes


def plan(recipe: Recipe) -> str:
    """The resolved config, the stages in order, and the memory of the largest, as text."""
    model = shapes(recipe.model)
    parameters = sum(p.numel() for p in model.parameters())
    device = resolve_device(recipe.model.device)
    dtype = resolve_dtype(recipe.model.dtype, device)
    lines = [
        dump(recipe).rstrip(),
        "",
        f"# {recipe.model.name}: {parameters / 1e6:.0f} M parameters "
        f"in {str(dtype).removeprefix('torch.')} on {device}",
        "# Plan:",
        *(f"#   {line}" for line in _stages(recipe)),
        "# Models:",
        *(f"#   {line}" for line in forms(recipe, model)),
        "# Memory at the peak:",
        *(f"#   {line}" for line in _memory(recipe, model, dtype)),
    ]
    return "\n".join(lines)


def _stages(recipe: Recipe) -> list[str]:
    lines = []
    if recipe.task:
        lines.append(f"data: {recipe.task.name}; held-out evaluation of the base model")
    if recipe.generation.backend != "engine":
        lines.append(f"vLLM samples, at {', '.join(recipe.generation.servers)}")
    configs = ((name, getattr(recipe, name)) for name in STAGES)
    lines += [f"{name}: {config.describe()}" for name, config in configs if config]
    return lines or ["nothing: the recipe has no stage"]


def _memory(recipe: Recipe, model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """The memory of each stage, and that of the largest stage by purpose."""
    shape, device = Shape.of(model, dtype), resolve_device(recipe.model.device)
    lora = recipe.model.lora
    stages: dict[str, dict[str, float]] = {}
    for name in STAGES:
        config = getattr(recipe, name)
        if config is None:
            continue
        policy = name in POLICIES
        trained = _adapter_size(shape, lora) if lora and policy else shape.parameters
        needs = config.memory_needs()
        if recipe.generation.backend != "engine":
            needs = replace(needs, rollout=None)
        free, adapters = free_bytes(device), lora is not None
        parts = parts_of(
            needs, recipe.engine, shape, trained, device, adapters, total_bytes(device)
        )
        activations = Activations(model.config, needs, dtype, device, lora if policy else None)
        tokens, recompute = micro_batch(needs, recipe.engine, activations, parts, free)
        size = passing(needs, shape, trained, activations.bytes(tokens, recompute))
        what = f"activations of {tokens} tokens{', computed again' if recompute else ''}"
        unknown = f" (not measured: {activations.unknown})" if activations.unknown else ""
        parts[what + unknown] = size
        stages[name] = with_total(parts)
    if not stages:
        return []
    largest = max(stages, key=lambda name: stages[name]["total"])
    lines = [f"{name}: {parts['total'] / GIB:.2f} GiB" for name, parts in stages.items()]
    lines += [f"the peak of {largest} is the sum of:"]
    lines += [f"{size / GIB:6.2f} GiB  {what}" for what, size in stages[largest].items()]
    key = f"{largest}.{getattr(recipe, largest).micro_batch_key}"
    if short := shortage(stages[largest]["total"], free_bytes(device), key):
        lines.append(f"NOT ENOUGH MEMORY for {largest}: {short}")
    return lines


def _adapter_size(shape: Shape, lora: AdapterConfig) -> int:
    """Parameters of an adapter on every linear layer; fewer where `targets` names some."""
    widths = [
        (shape.hidden, shape.heads * shape.head_size), (shape.hidden, shape.hidden),
        (shape.hidden, 2 * shape.inner), (shape.inner, shape.hidden),
    ]  # fmt: skip
    return shape.layers * lora.rank * sum(a + b for a, b in widths)
