"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: put into a model, switched off, saved,
and merged into the model that they were trained on.

The base weights stay where they are and are not trained; the model with its adapters switched off
is the reference policy, without a second copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.runtime.config import Config


class AdapterConfig(Config):
    """LoRA on the policy; the rest of it is not trained."""

    rank: int = Field(default=16, ge=1)
    """The rank of an adapter: it adds the product of two thin matrices to a weight, and `rank` is
    the size that they share."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The probability of dropout on an adapter's input, in supervised training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers get an adapter: `all-linear` means every linear layer except the head; a list
    names layers by the ends of their names, for example `q_proj`."""
    save: Literal["merged", "adapter"] = "merged"
    """What a stage's folder contains. `merged`: the whole model with the adapter added to its
    weights, and the adapter itself in `adapter/`. `adapter`: only the adapter, which can be loaded
    only where its base model is available."""


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Add a new adapter to the model, in place. From then on only the adapter is trained.

    Raises `ModelError` if `peft` is missing or a target is not there.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("LoRA needs peft; run: pip install 'gearshift[lora]'.") from error
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    try:
        model.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            )
        )
    except ValueError as error:
        raise ModelError(
            f"model.lora.targets: {str(error).splitlines()[0]} Give `all-linear`, or ends of "
            "names such as q_proj."
        ) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(module, "base_layer") for module in ends):
        raise ModelError(
            "model.lora.targets names the embedding or the head, which may be one weight; give "
            "linear layers between them, such as q_proj."
        )


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of each layer that carries an adapter."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model under its adapters; a model without adapters is returned unchanged."""
    on = [layer for _, layer in adapted_layers(model) if not layer.disable_adapters]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def switched(layer: Any) -> tuple[object, ...]:
    """The adapters that a layer adds to its output, and those that are merged into its weight."""
    added = () if layer.disable_adapters else tuple(layer.active_adapters)
    return added, tuple(layer.merged_adapters), tuple(layer.scaling.values())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or embedding is None:
        return False
    own, other = head.weight, embedding.weight
    return own is other or (not own.is_meta and own.data_ptr() == other.data_ptr())


def untie(model: PreTrainedModel) -> None:
    """Write into the config that the head is not the embedding, so that it is loaded so."""
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def save_adapter(folder: Path, model: PreTrainedModel, base: str) -> None:
    """Write the adapter as PEFT reads it; `base` names the model that it was trained on."""
    [config] = model.peft_config.values()
    config.base_model_name_or_path = None  # or peft asks the hub for the base's config
    model.save_pretrained(folder)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)


def merged_state(model: PreTrainedModel) -> dict[str, Any]:
    """The state dict that the model would have with its adapters merged, in the host's memory; the
    model stays as it is.
    """
    layers = dict(adapted_layers(model))
    state = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        name = key.removesuffix(".base_layer.weight").removesuffix(".base_layer.bias")
        layer = layers.get(name)
        if layer is not None and key.endswith(".weight"):
            for active in layer.active_adapters:
                value = (value.float() + layer.get_delta_weight(active).float()).to(value.dtype)
        state[key.replace(".base_layer.", ".")] = value.detach().to("cpu", copy=True)
    return state
