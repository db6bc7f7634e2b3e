"""A saved adapter, checked, and added to the weights that it was trained on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.models.adapter_files import SETTINGS, adapter_settings, tensors_of
from gearshift.models.adapters import is_tied, untie
from gearshift.models.saved_config import listed
from gearshift.runtime.terminal import one_line

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


def merge_adapter(model: PreTrainedModel, folder: Path, merge: bool = True) -> PreTrainedModel:
    """The model with the adapter of this folder in its weights, as if it had never been apart; or
    beside them, which stay as they are (`merge=False`).

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
            if not merge:
                return model.eval()
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
    settings, path = adapter_settings(folder), folder / SETTINGS
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
