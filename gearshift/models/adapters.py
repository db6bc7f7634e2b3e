"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: put into a model, switched off, saved,
and merged into the model that they were trained on.

The base weights stay where they are and are not trained; the model with its adapters switched off
is the reference policy, without a second copy.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from gearshift.errors import ModelError
from gearshift.models.saved import (
    FLOATS,
    Saved,
    check_kinds,
    is_folder,
    listed,
    settings_in,
    tensors_in,
)
from gearshift.runtime.config import Config
from gearshift.runtime.terminal import one_line
from gearshift.runtime.yaml_text import read_yaml

_SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MOST = 8
"""Adapters that stand on each other."""
_PATTERNS = "target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"
_SECONDS = 10
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        for part in (name, name.removeprefix("base_model.model.")):
            re.fullmatch(pattern, part), re.match(rf"(.*\\.)?({pattern})$", part)
"""


class AdapterConfig(Config):
    """LoRA on the policy; the rest of it is not trained."""

    rank: int = Field(16, ge=1)
    """Of each update: a weight gains up @ down, `rank` wide."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On an adapter's input, in supervised training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers: all linear ones but the head, or the ends of their names (`q_proj`)."""
    save: Literal["merged", "adapter"] = "merged"
    """What a stage's folder holds: the whole model with the adapter in its weights, the adapter
    itself beside it in `adapter/`; or the adapter alone, which loads where its base model lies.
    """


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Put a fresh adapter into the model, in place; only it is trained from now on.

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
    """The model as it was before its adapters; any model, for one without adapters."""
    on = [layer for _, layer in adapted_layers(model) if not layer.disable_adapters]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def switched(layer: Any) -> tuple[object, ...]:
    """What of its adapters a layer adds to its output, and what its weight has of them."""
    added = () if layer.disable_adapters else tuple(layer.active_adapters)
    return added, tuple(layer.merged_adapters), tuple(layer.scaling.values())


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of the adapter that this name means, a local folder's or one of the hub; None
    where it means a model.
    """
    found = [file_of(name, file) for file in (_SETTINGS, _WEIGHTS)]
    if found[0] is None:
        return None
    if found[1] is None:
        raise ModelError(f"The adapter in {name} has no {_WEIGHTS}; save it as safetensors.")
    return found[0].parent


def file_of(name: str | Path, file: str) -> Path | None:
    """A file of a model, in a local folder or of the hub; None where there is none."""
    if is_folder(name):
        return Path(name, file) if Path(name, file).is_file() else None
    try:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # no name of the hub: who loads it as a model says so
        return None
    return Path(found) if found else None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the adapter's own config says. Raises `ModelError`."""
    return settings_in(folder / _SETTINGS)


def tensors_of(folder: Path) -> dict[str, Saved]:
    """What an adapter's file says of each tensor. Raises `ModelError`."""
    return check_kinds(folder, tensors_in(folder / _WEIGHTS), FLOATS)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was trained on: a folder's is meant from here or from
    the adapter's folder. Raises `ModelError` if it is not told, or if adapters stand on each other
    in a circle.
    """
    found, seen = _named_base(folder), {folder.resolve()}
    below = Path(found)
    while is_folder(below) and (below / _SETTINGS).is_file():
        if below.resolve() in seen or len(seen) > _MOST:
            how = (
                "names itself" if len(seen) == 1 else f"stands on {len(seen)} others, or on itself,"
            )
            raise ModelError(
                f"The adapter in {folder} {how} as the model it was trained on; give its base "
                f"model as base_model_name_or_path in {folder / _SETTINGS}."
            )
        seen.add(below.resolve())
        below = Path(_named_base(below))
    return found


def _named_base(folder: Path) -> str:
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"The adapter in {folder} does not say which model it was trained on; write its name "
            f"or folder as base_model_name_or_path into {folder / _SETTINGS}."
        )
    places = filter(is_folder, (Path(base).expanduser(), folder / base, *_beside(folder, base)))
    return next(
        (str(p) for p in places if any((p / f).is_file() for f in (_SETTINGS, "config.json"))), base
    )


def _beside(folder: Path, base: str) -> list[Path]:
    """The stage of the base's name in the run that the adapter is of, which may have been moved;
    none where the base was a stage of another run.
    """
    recipe = folder.parent / "recipe.yaml"
    if not recipe.is_file():
        return []
    tree = read_yaml(recipe)
    run = tree.get("run") if isinstance(tree, dict) else None
    own = isinstance(run, dict) and Path(str(run.get("dir"))).name == Path(base).parent.name
    return [folder.parent / Path(base).name] if own else []


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter of this folder in its weights, as if it had never been apart.

    Raises `ModelError` for an adapter that is no change of weights, or does not fit the model.
    """
    try:
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ModelError("LoRA needs peft; run: pip install 'gearshift[lora]'.") from error
    shared = model.get_input_embeddings().weight if is_tied(model) else None
    _check_settings(folder, model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ModelError(
                f"The adapter in {folder} is of the kind {config.peft_type.value}, which changes "
                "no weights; only adapters that do (LoRA and its kin) can be used."
            )
        config.task_type = None  # which class the model has is known already
        _resize(model, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel(model, config)
            weights = _once(load_peft_weights(str(folder), device=str(model.device)))
            found = set_peft_model_state_dict(adapted, weights)
            own = f".{adapted.base_model.prefix}"
            left = _left(found.missing_keys, found.unexpected_keys, model, own)
            if left:
                raise ValueError(f"it leaves {listed(left)}")
            for layer in adapted.modules():
                if isinstance(layer, BaseTunerLayer):
                    _merge_layer(layer, shared)
            merged: PreTrainedModel = adapted.merge_and_unload()
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, re.error) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"The adapter in {folder} does not fit {model.config.name_or_path or 'its model'} "
            f"({reason[:200]}); give the model that it was trained on."
        ) from error
    if shared is not None and not is_tied(merged):  # one of the two was trained alone
        untie(merged)
    return merged.requires_grad_(True)


def _once(weights: dict[str, Any]) -> dict[str, Any]:
    """Each trained layer under one name: peft writes an embedding that was resized thrice."""
    copies = re.compile(r"\.(modules_to_save|original_module)\.")
    return {
        name: weight for name, weight in weights.items()
        if not copies.search(name) or copies.sub(".", name) not in weights
    }  # fmt: skip


def _check_settings(folder: Path, model: PreTrainedModel) -> None:
    """Raises `ModelError` for an adapter whose settings would take all memory or time, give no
    number, or run what they name.
    """
    settings, path = adapter_settings(folder), folder / _SETTINGS
    saved = tensors_of(folder)
    longest = max((size for tensor in saved.values() for size in tensor.shape), default=0)
    for key, what in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        pattern = settings.get(what) or {}
        given = [settings.get(key), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
        for value in given:
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or (key == "r" and not 0 <= value <= longest):
                raise ModelError(
                    f"{path} has {key}: {one_line(str(value), 40)}, which is not what its weights "
                    "were trained with; give the adapter's own config."
                )
    for key in ("megatron_config", "layer_replication"):
        if settings.get(key):
            raise ModelError(f"{path} has {key}, which is no change of weights; give another.")
    for key in _PATTERNS:
        found = settings.get(key)
        patterns = [found] if isinstance(found, str) else list(found or ())
        if not _end([p for p in patterns if isinstance(p, str)], model):
            raise ModelError(
                f"{path} has {key}: {one_line(str(found), 60)}, a pattern that takes too long; "
                "give names of modules."
            )


def _end(patterns: list[str], model: PreTrainedModel) -> bool:
    """Whether matching them with the model's modules ends, tried in a process of its own."""
    if not any(re.search(r"[*+{|]", pattern) for pattern in patterns):
        return True
    names = [f"base_model.model.{name}" for name, _ in model.named_modules()]
    try:
        subprocess.run(
            [sys.executable, "-ISc", _MATCH], input=json.dumps([patterns, names]).encode(),
            timeout=_SECONDS, capture_output=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return True


def _merge_layer(layer: Any, shared: nn.Parameter | None) -> None:
    """Add the adapter to the layer's weight, in float32, so that the sum is rounded once. `shared`:
    the weight of embedding and head; the one that has an adapter parts from the other.
    """
    base = layer.get_base_layer()
    if shared is not None and any(p is shared for p in base.parameters(recurse=False)):
        base.weight = nn.Parameter(shared.detach().clone())
    dtype = next(base.parameters()).dtype
    base.float()
    layer.merge()
    base.to(dtype)


def _left(missing: list[str], unexpected: list[str], model: PreTrainedModel, own: str) -> list[str]:
    """What a file and a model do not have of each other's adapter, but for a language model's head
    where the model has another: a reward model starts from a policy. `own`: how names of what this
    kind of adapter adds begin.
    """
    lost = [key for key in missing if own in key or ".modules_to_save." in key]
    if model.get_output_embeddings() is None:
        unexpected = [key for key in unexpected if "head" not in key and "embed_out" not in key]
    return [*lost, *unexpected]


def _resize(model: PreTrainedModel, folder: Path) -> None:
    """Give the embedding as many rows as the adapter brings, where it brings them: its tokenizer
    had tokens added, or rows of no token were taken away.
    """
    embedding = model.get_input_embeddings()
    [name] = [name for name, module in model.named_modules() if module is embedding]
    saved = tensors_of(folder)
    rows = next((w.shape[0] for key, w in saved.items() if key.endswith(f"{name}.weight")), 0)
    if rows not in (0, embedding.weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return (
        isinstance(head, nn.Linear)
        and embedding is not None
        and head.weight.data_ptr() == embedding.weight.data_ptr()
    )


def untie(model: PreTrainedModel) -> None:
    """Let the config say that the head is not the embedding, for those who will load it."""
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
    """The state dict that the model would have with its adapters merged; the model stays as it
    is.
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
        state[key.replace(".base_layer.", ".")] = value.detach().clone()
    return state
