"""What a recipe would do, and the memory that it would take: `--dry-run`. It loads configs and
shapes, no weights; `memory.py` predicts the memory.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gearshift.models.adapters import AdapterConfig
from gearshift.models.load import resolve_device, resolve_dtype
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.forms import forms, shapes
from gearshift.pipeline.machine import GIB, Machine
from gearshift.pipeline.memory import Shape, fit, shortage
from gearshift.pipeline.recipe import POLICIES, STAGES, Recipe, StageName
from gearshift.runtime.config import dump


def plan(recipe: Recipe, on: str | None = None) -> str:
    """The resolved config, the stages in order, and the memory of each, as text. `on` names another
    machine (`Machine.named`).
    """
    model = shapes(recipe.model)
    parameters = sum(p.numel() for p in model.parameters())
    device = resolve_device(recipe.model.device)
    if on is None:
        machine, dtype = Machine.here(device), resolve_dtype(recipe.model.dtype, device)
    else:
        machine = Machine.named(on, recipe.scale)
        asked = recipe.model.dtype
        dtype = torch.bfloat16 if asked == "auto" else resolve_dtype(asked, device)
    ranks = f", {machine.ranks} ranks ({recipe.scale.strategy})" if machine.ranks > 1 else ""
    lines = [
        dump(recipe).rstrip(),
        "",
        f"# {recipe.model.name}: {parameters / 1e6:.0f} M parameters "
        f"in {str(dtype).removeprefix('torch.')} on {machine.device}{ranks}",
        "# Plan:",
        *(f"#   {line}" for line in _stages(recipe)),
        "# Models:",
        *(f"#   {line}" for line in forms(recipe, model)),
        f"# Memory at the peak{' of each rank' if ranks else ''}:",
        *(f"#   {line}" for line in _lines(recipe, memory(recipe, model, dtype, machine), machine)),
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


def memory(
    recipe: Recipe, model: PreTrainedModel, dtype: torch.dtype, machine: Machine
) -> dict[StageName, dict[str, float]]:
    """Bytes of each stage on one rank, by purpose, with their sum. `model` has shapes only."""
    shape, stages = Shape.of(model, dtype), {}
    for name in STAGES:
        config = getattr(recipe, name)
        if config is None:
            continue
        lora = recipe.model.lora if name in POLICIES else None
        trained = adapter_size(shape, lora) if lora else shape.parameters
        needs = recipe.memory_needs(name)
        # Activations of another machine's GPU are measured on the device that is here.
        device = resolve_device(recipe.model.device)
        activations = Activations(model.config, needs, dtype, device, lora, type(model))
        fitted = fit(needs, recipe.engine, shape, trained, machine, activations, lora is not None)
        stages[name] = fitted.parts
    return stages


def _lines(
    recipe: Recipe, stages: dict[StageName, dict[str, float]], machine: Machine
) -> list[str]:
    lines = []
    for name, parts in stages.items():
        free = f"{machine.free / GIB:.2f} GiB are free"
        lines.append(f"{name}: {parts['total'] / GIB:.2f} GiB, and {free}; it is the sum of:")
        lines += [f"{size / GIB:8.2f} GiB  {what}" for what, size in parts.items() if size]
        key = f"{name}.{getattr(recipe, name).micro_batch_key}"
        if short := shortage(parts["total"], machine.free, key):
            lines.append(f"NOT ENOUGH MEMORY for {name}: {short}")
    return lines


def adapter_size(shape: Shape, lora: AdapterConfig) -> int:
    """Parameters of an adapter on every linear layer; fewer where `targets` names some."""
    widths = [
        (shape.hidden, shape.heads * shape.head_size), (shape.hidden, shape.hidden),
        (shape.hidden, 2 * shape.inner), (shape.inner, shape.hidden),
    ]  # fmt: skip
    return shape.layers * lora.rank * sum(a + b for a, b in widths)
