"""Reads a saved model on several ranks: each reads its own rows of every tensor from the files, and
the ranks send each other the rest. It must not import the runner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from gearshift.models.saved_config import INDEX
from gearshift.models.saved_weights import FLOATS, WEIGHTS, Saved
from gearshift.runtime.distributed import world
from gearshift.runtime.peak_memory import NoDraws

_SMALL = 1 << 14
"""A tensor of so many numbers is filled where a model is made without its weights."""


def why_whole(model: PreTrainedModel, weights: Mapping[str, Saved], dtype: torch.dtype) -> str:
    """Why each rank must load the whole files itself; empty if it can read a part. `model` may be
    on the meta device, and `weights` are what the files hold.
    """
    if model.config.tie_word_embeddings:
        return "its head is tied to its embedding"
    if get_model_conversion_mapping(model, add_legacy=False):
        return "its files have other tensors than the model"
    if dtype != torch.float32 and (
        model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    ):
        return "it keeps some weights in float32"
    asked = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if asked != {name: saved.shape for name, saved in weights.items()}:
        return "its files have other tensors than the model"
    if any(x.numel() > _SMALL for _, x in model.named_non_persistent_buffers()):
        return "it computes large tensors itself"
    if any(saved.kind not in FLOATS for saved in weights.values()):
        return "its files have numbers that are not floats"
    return ""


def read_in_parts(
    auto: Any,
    config: PreTrainedConfig,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    attention: str | None,
) -> tuple[PreTrainedModel, int]:
    """The model in a folder for which `why_whole` is empty, and how many bytes this rank has read.
    All ranks call it. A rank holds no tensor of the files whole in the host's memory, if the device
    is a GPU.
    """
    with torch.random.fork_rng(devices=[]), NoDraws(), torch.device(device):
        model: PreTrainedModel = auto.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    files, read = _files(folder), 0
    for file in sorted({*files.values()}):
        with safe_open(str(folder / file), "pt") as opened:
            for name, target in model.state_dict().items():
                if files[name] == file:
                    read += _fill(target, opened.get_slice(name))
    return model, read


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    if (folder / WEIGHTS).exists():
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    found: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    return found


@torch.no_grad()
def _fill(target: Tensor, saved: Any) -> int:
    """Fill a tensor with what was saved; returns how many bytes this rank has read."""
    rows = world().part_of(len(target)) if target.ndim else ...
    own = saved[rows]
    read: int = own.nbytes
    own = own.to(target.device, target.dtype).reshape(-1)
    if target.ndim:
        most = -(-len(target) // world().size) * (target.numel() // max(1, len(target)))
        own = world().all_gather(nn.functional.pad(own, (0, most - len(own))))
    target.copy_(own[: target.numel()].view_as(target))
    return read
