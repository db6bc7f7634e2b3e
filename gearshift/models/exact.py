"""Up to which length a model is computed as Hugging Face does, and the reason for the limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.errors import CapacityError

_STATE = re.compile(
    "Mamba|SSM|Ssm|Rwkv|LSTM|Recurrent|Delta|ShortConv|Lightning|LinearAttention|RgLru|RGLRU"
)
"""Names of modules that carry something from token to token beside keys and values."""


class Limit(NamedTuple):
    """Sequences are computed correctly up to this many tokens."""

    tokens: int
    why: str

    def check(self, batch: PackedBatch) -> None:
        """Raises `CapacityError` for a longer sequence in the batch."""
        if (longest := batch.longest) > self.tokens:
            raise CapacityError(
                f"A sequence of {longest} tokens is longer than the {self.tokens} that this model "
                f"can be trained or scored on ({self.why}); shorten it."
            )


def named(model: PreTrainedModel) -> str:
    """The model's class and type, as errors name it."""
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def context_length(config: Any) -> int | None:
    """The greatest number of tokens that the model reads by its config; None if it gives none."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def limits(model: PreTrainedModel, windows: set[int | None]) -> list[Limit]:
    """What a short comparison cannot see: lengths from which on the model would be computed
    otherwise than by Hugging Face. `windows`: those that the forward passed on to its attention.
    """
    config = model.config.get_text_config()
    found = [*_rope_limits(model), *_window_limits(config, windows)]
    longest = context_length(config)
    if longest and not any(hasattr(config, n) for n in ("rope_parameters", "rope_theta")):
        found.append(Limit(longest, "it has no position beyond"))
    return found


def shortest(found: list[Limit]) -> Limit | None:
    """The lowest of the limits."""
    return min(found, default=None)


def _rope_limits(model: PreTrainedModel) -> Iterator[Limit]:
    """Rotary embeddings whose frequencies follow the longest position of a whole batch."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        ropes = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            rope = ropes if layer_type is None else ropes.get(layer_type, {})
            why = f"its {kind} rotary embedding follows the longest sequence of a batch beyond"
            if kind == "longrope" and "original_max_position_embeddings" in rope:
                yield Limit(int(rope["original_max_position_embeddings"]), why)
            elif "dynamic" in str(kind):
                yield Limit(int(module.original_max_seq_len), why)


def _window_limits(config: Any, windows: set[int | None]) -> Iterator[Limit]:
    """Windows and chunks that Hugging Face puts into a mask, which the engine does not read."""
    kinds = getattr(config, "layer_types", None)
    whole = kinds is not None and not any(
        word in kind for kind in kinds for word in ("sliding", "chunk", "window", "local")
    )
    if whole or getattr(config, "use_sliding_window", None) is False:
        return
    for name, size in vars(config).items():
        if not re.search(r"window(_size|_len)?$|attention_chunk_size|local_attention$", name):
            continue
        if type(size) is int and size > 0 and size not in windows:
            yield Limit(size, f"its {name} of {size} is only in Hugging Face's mask")


def keeps_state(model: PreTrainedModel) -> str | None:
    """The reason why a token depends on more than the keys and values of earlier tokens; None if it
    does not.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    indexed = any(hasattr(config, name) for name in ("index_topk", "indexer_budget"))
    if indexed or any("sparse" in str(kind) for kind in kinds):
        return "its indexer chooses keys by an attention mask, which the engine does not make"
    for name, module in model.base_model.named_modules():
        if not name or re.search("vision|audio", name):
            continue
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d) or _STATE.search(kind):
            return f"it keeps a state beside keys and values ({name}: {kind})"
    return None
