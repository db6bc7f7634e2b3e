"""Policies that differ by an adapter alone, on one copy of their base model's weights."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel

from gearshift.models.adapter_files import adapter_folder, adapter_settings, base_of, tensors_of
from gearshift.models.adapter_merge import merge_adapter
from gearshift.models.embedded import source_of

_APART = (".lora_A.weight", ".lora_B.weight")
"""How the names of an adapter's tensors end if they are all that it adds to a base model."""
_MORE = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens")
"""Settings of a LoRA adapter that change more than the output of a linear layer."""


def separable(source: str) -> tuple[Path, str] | None:
    """The adapter of a policy, and the base model that it was trained on, where the engine can run
    it on weights that it does not change: plain LoRA. The policy is a folder with an adapter, or
    with a merged model that has its adapter in `adapter/`. None for any other policy.
    """
    place = Path(source_of(source)).expanduser()
    folders = [f for f in (place, place / "adapter") if f.is_dir()]
    adapter = next((found for f in folders if (found := adapter_folder(f))), None)
    if adapter is None:
        return None
    settings = adapter_settings(adapter)
    plain = settings.get("peft_type") == "LORA" and not any(settings.get(key) for key in _MORE)
    if not plain or not all(name.endswith(_APART) for name in tensors_of(adapter)):
        return None
    return adapter, base_of(adapter)


def copy_on_base(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same parameters, which are not copied."""
    twin: PreTrainedModel = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return twin


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter of this folder beside its weights, which stay as they are. Raises
    `ModelError` for one that does not fit.
    """
    return merge_adapter(model, adapter, merge=False)
