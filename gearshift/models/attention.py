"""The attention of both gears: one function for the arithmetic, and its entry in Hugging Face's
registry.

What a layer may attend to is an argument of the model's forward (`layout=`), never a global. L is
the keys of a row; `gearshift/types.py` explains the other letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging as hf_logging

from gearshift.batch import PackedBatch
from gearshift.errors import ModelError
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.specs import AttentionOptions

ATTENTION = "gearshift"
"""The name under which Hugging Face models find `hf_attention`."""
NO_INTERFACE = "its attention does not go through Hugging Face's attention interface"


class Layout(Protocol):
    """The attention of one forward: which tokens see which, and where keys are kept."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[B, Q, S, D] queries, [B, K, S, D] keys and values -> [B, Q, S, D]."""
        ...


class LostLayoutError(ModelError):
    """An attention layer was called without its layout, which says which tokens belong together."""


def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [B, Q, S, D] in, [B, S, Q, D] out.

    Values of another size than the queries' (latent attention) are filled up with zeros, and what
    these become is cut off.
    """
    if layout is None:
        raise LostLayoutError(
            "This model was loaded for the engine; to call it directly, first run "
            "model.set_attn_implementation('sdpa')."
        )
    if s_aux is not None:
        raise ModelError("its attention has sinks, which the engine does not compute")
    if attention_mask is not None or others.get("position_bias") is not None:
        raise ModelError("it makes attention masks or biases itself, which the engine ignores")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scaling, dropout, sliding_window, softcap)
    layer = int(getattr(module, "layer_idx", 0) or 0)
    size, own = query.shape[-1], value.shape[-1]
    if own > size:
        raise ModelError("its values are longer than its queries, which its cache has no place for")
    if own < size:
        value = F.pad(value, (0, size - own))
    return layout.attend(query, key, value, layer, options).transpose(1, 2)[..., :own], None


AttentionInterface.register(ATTENTION, hf_attention)


def require_attention(model: PreTrainedModel) -> None:
    """Raises `ModelError` where the model would ignore a layout, so that every sequence would see
    every other one.
    """
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(
            f"The model's attention is {model.config._attn_implementation!r}; "
            "the engine needs its own: run "
            f"model.set_attn_implementation({ATTENTION!r})."
        )


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context the model uses Hugging Face's own attention; afterwards its attention is
    as before. Raises `ModelError` where the model keeps another one.
    """
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a model that keeps another one only logs that
    try:
        for name in (ATTENTION, "eager"):
            model.set_attn_implementation(name)
            if model.config.get_text_config()._attn_implementation != name:
                raise ModelError(NO_INTERFACE)
        yield
    finally:
        hf_logging.set_verbosity(level)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


class PackedLayout:
    """Attention of a `PackedBatch`: see `PackedSequences`."""

    def __init__(self, batch: PackedBatch) -> None:
        self.sequences = PackedSequences(batch)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, Q, T, D] queries, [1, K, T, D] keys and values -> [1, Q, T, D]."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.packed(q, k, v, options).transpose(0, 1)[None]

    def packed(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] queries, keys and values -> [T, Q, D]."""
        return kernels_for(q).attend_packed(q, k, v, self.sequences, options)
