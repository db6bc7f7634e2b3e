"""What a recipe would do and hold, told before it does it: `--dry-run`. Loads configs and shapes,
no weights.

The memory is a sum of what is known (weights, masters, moments, gradients, cache) and a rough bound
for activations.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gearshift.errors import ModelError
from gearshift.models.load import EMBEDDED, TINY, embedded_folder, resolve_device, resolve_dtype
from gearshift.models.tiny import tiny_model
from gearshift.pipeline import Recipe
from gearshift.runtime.config import dump

_GIB = 2**30


def plan(recipe: Recipe) -> str:
    """The resolved config, the stages in order, and the memory of the largest, as text."""
    model = _shapes(recipe)
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
        "# Memory of the largest stage:",
        *(
            f"#   {size / _GIB:6.2f} GiB  {what}"
            for what, size in _memory(recipe, model, dtype).items()
        ),
    ]
    return "\n".join(lines)


def _shapes(recipe: Recipe) -> PreTrainedModel:
    name = recipe.model.name
    if name == TINY:
        return tiny_model()
    source = embedded_folder() if name == EMBEDDED else name
    try:
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"Model {name!r} was not found ({reason}); give a folder or a Hugging Face name."
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _stages(recipe: Recipe) -> list[str]:
    lines = []
    if recipe.task:
        lines.append(f"data: {recipe.task.name}; held-out evaluation of the base model")
    if recipe.sft:
        lines.append(f"sft: {recipe.sft.epochs:g} epochs in batches of {recipe.sft.batch_size}")
    if recipe.preference:
        how = recipe.preference
        lines.append(
            f"preference: {how.loss}, {how.epochs:g} epochs in batches of {how.batch_size}"
        )
    if recipe.process:
        how_steps = recipe.process
        lines.append(
            f"process: {how_steps.epochs:g} epochs in batches of {how_steps.batch_size} answers"
        )
    if recipe.reward:
        lines.append(
            f"reward: {recipe.reward.epochs:g} epochs in batches of {recipe.reward.batch_size} "
            "pairs"
        )
    if recipe.rl:
        rl = recipe.rl
        lines.append(
            f"rl: {rl.steps} steps of {rl.prompts} prompts x {rl.group_size} completions, "
            f"advantage {rl.advantage}, loss {rl.loss}, "
            f"{rl.epochs * rl.minibatches} updates a step, "
            f"KL {rl.kl.estimator} x {rl.kl.beta:g} in the {rl.kl.where}"
        )
    return lines or ["nothing: the recipe has no stage"]


def _memory(recipe: Recipe, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    count = sum(p.numel() for p in model.parameters())
    weights = count * dtype.itemsize
    masters = 0 if dtype == torch.float32 else 4 * count
    parts: dict[str, float] = {
        "weights": weights,
        "gradients": weights,
        "AdamW moments and fp32 masters": 8 * count + masters,
    }
    if masters:
        parts["fp32 gradients at the step"] = 4 * count
    config = model.config.get_text_config()
    tokens = max(s.max_tokens for s in (recipe.sft, recipe.reward, recipe.rl) if s) if any(
        (recipe.sft, recipe.reward, recipe.rl)
    ) else 0  # fmt: skip
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    parts[f"activations of {tokens} tokens"] = (
        tokens * layers * (12 * hidden + 5 * inner) * dtype.itemsize
    )
    if recipe.rl:
        copies = (recipe.rl.kl.beta > 0) + (recipe.rl.value == "critic")
        if copies:
            parts["reference and critic weights"] = copies * weights
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        rows = min(recipe.engine.max_rows, recipe.rl.prompts * recipe.rl.group_size)
        length = recipe.rl.max_new_tokens + 128
        parts[f"KV cache of {rows} rows x {length} tokens"] = (
            2 * layers * heads * size * rows * length * dtype.itemsize
        )
    parts["total"] = sum(parts.values())
    return parts
