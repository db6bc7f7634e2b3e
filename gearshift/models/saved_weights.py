"""Checks that the weights of a saved model are complete and fit its config. An error names the file
and the weight: a library fills what is missing with random numbers, and drops what it does not
know.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.models.exact import named
from gearshift.models.saved_config import (
    INDEX,
    listed,
    numbers_in,
    refuse,
    settings_in,
)
from gearshift.runtime.terminal import counted, one_line

WEIGHTS = "model.safetensors"
FLOATS = {"F64", "F32", "F16", "BF16"}
_WHOLE = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_HEAD = re.compile(
    r"head|cls|classif|score|predict|pred_layer|vocab_|embed_out|lm_loss|generator|pooler|summary"
    r"|qa_outputs|output_projection|final_logits_bias|^decoder\.(weight|bias)$"
)
"""Names of what a model has above its states, which another task does without."""
_CONSTANTS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|embeddings\.position_ids$"
)
"""What older libraries saved beside the weights: a model makes these numbers itself."""


class Saved(NamedTuple):
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    kind: str


def saved_weights(folder: Path) -> dict[str, Saved]:
    """Shape and type of each tensor in the files. Raises `ModelError` for one that is torn,
    missing, not where the index has it, or there twice.
    """
    if (folder / WEIGHTS).exists():
        weights = tensors_in(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        weights = _indexed(folder)
    else:
        _refuse_other_kinds(folder)
    check_experts(folder, weights)
    return check_kinds(folder, weights)


def check_kinds(
    folder: Path, weights: dict[str, Saved], good: Set[str] = FLOATS | _WHOLE
) -> dict[str, Saved]:
    """The weights. Raises `ModelError` for types that have a meaning only with a scale."""
    if kinds := {w.kind for w in weights.values()} - good:
        names = listed(name for name, w in weights.items() if w.kind in kinds)
        refuse(
            folder, f"holds quantised weights ({', '.join(sorted(kinds))}: {names})",
            "give them in bf16 or fp32",
        )  # fmt: skip
    return weights


def tensors_in(path: Path) -> dict[str, Saved]:
    """Shape and type of each tensor in a safetensors file."""
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with safe_open(str(path), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Saved(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is no whole safetensors file ({one_line(str(error), 150)}); copy or save it "
            "again."
        ) from error


def _indexed(folder: Path) -> dict[str, Saved]:
    """The tensors of all files that the index names."""
    index = folder / INDEX
    places = settings_in(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        refuse(index, "has no weight_map of names to files", "save the model again")
    weights: dict[str, Saved] = {}
    for file in sorted(set(places.values())):
        path = folder / file
        if Path(file).is_absolute() or ".." in Path(file).parts:  # the user made the link
            refuse(
                index, f"names {one_line(file, 100)}, which lies outside of its folder",
                "put the file beside the index",
            )  # fmt: skip
        if not path.is_file():
            refuse(index, f"names {one_line(file, 100)}, which is not there", "copy it again")
        held = tensors_in(path)
        if twice := held.keys() & weights.keys():
            refuse(path, f"holds {listed(twice)}, as another file does", "save the model again")
        lost = [n for n, f in places.items() if f == file and n not in held]
        if lost:
            refuse(path, f"lacks {listed(lost)}, which its index names", "copy it again")
        weights |= held
    return weights


def _refuse_other_kinds(folder: Path) -> NoReturn:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf"):
        if found := next(folder.glob(pattern), None):
            refuse(
                folder, f"holds its weights as {found.name} and not as {WEIGHTS}",
                "load it with the library that made it and save it with save_pretrained",
            )  # fmt: skip
    refuse(folder, f"holds no weights ({WEIGHTS} is not there)", "copy them into it")


def check_experts(folder: Path, weights: dict[str, Saved], even: bool = False) -> None:
    """Raises `ModelError` for experts that are missing, which a library loads as one tensor, in the
    order of their numbers, whatever those are. `even`: each has the same parts.
    """
    groups: dict[str, dict[str, dict[int, Saved]]] = defaultdict(lambda: defaultdict(dict))
    for name, saved in weights.items():
        if found := re.fullmatch(r"(.*experts\.)(\d{1,6})(\..*)", name):
            groups[found[1]][found[3]][int(found[2])] = saved
    for prefix, parts in groups.items():
        most = max(map(len, parts.values()))
        for part, held in parts.items():
            lost = set(range(most if even else len(held))) - held.keys()
            odd = {i for i, saved in held.items() if saved.shape != next(iter(held.values())).shape}
            for which, what in ((lost, "has no weights for"), (odd, "has an odd shape of")):
                if which:
                    names = listed(f"{prefix}{i}{part}" for i in which)
                    refuse(folder, f"{what} {names}", "give a whole model")


def check_size(folder: Path, weights: dict[str, Saved], model: PreTrainedModel) -> None:
    """Raises `ModelError` where a config asks for much more than the files hold, before memory is
    taken for it. `model`: on the meta device.
    """
    held = sum(math.prod(w.shape) for w in weights.values())
    asked = sum(p.numel() for p in model.parameters())
    if asked > 2 * held + 2**24:
        refuse(
            folder / "config.json",
            f"asks for {asked:,} weights and the files hold {held:,}", "give the model's own",
        )  # fmt: skip


def check_layers(folder: Path, weights: dict[str, Saved]) -> None:
    """The same, before the layers of a model are made."""
    for key, value in numbers_in(settings_in(folder / "config.json")):
        if re.search(r"(^|_)(hidden_layers|n_layers?|num_layers)$", key) and value > max(
            len(weights), 200
        ):
            refuse(
                folder / "config.json",
                f"has {key}: {value} and the files hold {len(weights)} tensors",
                "give the model's own",
            )


def check_loaded(
    name: str,
    model: PreTrainedModel,
    report: dict[str, Any],
    weights: dict[str, Saved],
    fresh_head: bool = False,
) -> set[str]:
    """Raises `ModelError` by name for what the files lack, have too much, or in another shape.
    `report` is `from_pretrained`'s. `fresh_head`: what lies above the states may be missing;
    returns what of it is.
    """
    missing = set(report["missing_keys"])
    unexpected = {key for key in report["unexpected_keys"] if not _CONSTANTS.search(key)}
    fresh = set()
    if fresh_head:
        trunk = model.base_model_prefix
        inside = {trunk, *(name for name, _ in model.base_model.named_children())}
        under = inside if model.base_model is model else {trunk}
        fresh = {k for k in missing if k.split(".")[0] not in under or "pooler" in k}
        unexpected = {
            k for k in unexpected
            if not (_HEAD.search(k) and (k.split(".")[0] not in inside or "pooler" in k))
        }  # fmt: skip
        missing -= fresh
    elif model.get_output_embeddings() is None:
        unexpected = {key for key in unexpected if "pooler" not in key}  # the head reads none
    if missing:
        raise ModelError(
            f"Model {name!r} has no weights for {listed(missing)}; they would be random: give a "
            f"whole {'language model' if model.get_output_embeddings() is not None else 'model'}."
        )
    if wrong := report["mismatched_keys"]:
        key, has, needs = min(wrong)
        if model.get_output_embeddings() is None and needs[0] == 1 and has[1:] == needs[1:]:
            raise ModelError(
                f"Model {name!r} gives {has[0]} scores ({key} of shape {list(has)}), and a reward "
                "model gives one; give one trained with num_labels=1, or a language model."
            )
        more = f" and {counted(len(wrong) - 1, 'other')}" if len(wrong) > 1 else ""
        raise ModelError(
            f"Model {name!r} has {key} of shape {list(has)}{more}, and its config.json asks for "
            f"{list(needs)}; give the config and the weights of one model."
        )
    if unexpected:
        raise ModelError(
            f"Model {name!r} has weights that {type(model).__name__} has no place for: "
            f"{listed(unexpected)}; give the config and the weights of one model."
        )
    parts = {n.split(".")[-1] for n, _ in model.named_parameters()}
    whole = [
        n for n, w in weights.items()
        if w.kind in _WHOLE and len(w.shape) <= 3 and n.split(".")[-1] in parts
    ]  # fmt: skip
    if whole:
        raise ModelError(
            f"Model {name!r} has whole numbers for {listed(whole)}: quantised weights without "
            "their scale; give the model in bf16 or fp32."
        )
    return fresh


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises `ModelError` that names the weights which are not finite."""
    bad = [
        n for n, w in model.state_dict().items()
        if w.is_floating_point() and w.numel() and not torch.stack(w.aminmax()).isfinite().all()
    ]  # fmt: skip
    if bad:
        raise ModelError(
            f"Model {name!r} has weights that are not finite in {named(model)}: {listed(bad)}; "
            "give a model whose training has not diverged, or model.dtype=float32."
        )
