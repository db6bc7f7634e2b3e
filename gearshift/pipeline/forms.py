"""How each model of a recipe will run: by described layers or through Hugging Face's modules. It is
read off configs, without weights.
"""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from gearshift.errors import GearshiftError, ModelError
from gearshift.models.describe import described
from gearshift.models.from_pretrained import said
from gearshift.models.load import ModelConfig, load_config
from gearshift.models.runner import EXACT, form_line
from gearshift.pipeline.recipe import Recipe
from gearshift.trainers.rl.methods import CriticConfig


def shapes(config: ModelConfig, name: str | None = None, policy: bool = True) -> PreTrainedModel:
    """A model of the config's shapes, without memory for its weights. `name` names another one than
    the config; `policy=False` is for a model that may write no text.
    """
    found = load_config(config, name)
    kind = AutoModelForCausalLM if policy else AutoModel
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(found)
            return model
    except Exception as error:  # a config that is not ours may fail in any way
        raise ModelError(
            f"Model {name or config.name!r} cannot be built ({said(error)}); name a language model."
        ) from error


def form_of(name: str) -> str:
    """One line: how the model of this name runs."""
    model = shapes(ModelConfig(name=name), policy=False)
    return form_line(name, model, described(model)[1])


def forms(recipe: Recipe, policy: PreTrainedModel) -> list[str]:
    """One line for each model. `policy` has the policy's shapes."""
    models: dict[str, str | None] = {"policy": None}
    if recipe.reward:
        models["reward model"] = recipe.reward.model
    if recipe.rl and recipe.rl.kl.beta > 0:
        models["reference"] = recipe.rl.kl.reference
    if recipe.rl and isinstance(recipe.rl.value, CriticConfig):
        models["critic"] = recipe.rl.value.init_from
    lines = []
    for role, name in models.items():
        if name == "reward":  # this run's reward model
            name = recipe.reward.model if recipe.reward else None
        try:
            model = policy if name is None else shapes(recipe.model, name, policy=False)
        except GearshiftError:  # a run that uses it refuses it; another run may make it first
            lines.append(f"{role}: {name} cannot be read yet")
            continue
        lines.append(form_line(role, model, described(model)[1]))
    asked = recipe.rl.rewards if recipe.rl else ()
    if any(part.source.partition(":")[0] == "model" for part in asked):
        lines.append(form_line("reward model that scores rollouts", policy, EXACT))
    return lines
