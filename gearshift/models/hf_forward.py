"""The forward of Hugging Face's own modules over packed tokens, for any model whose attention goes
through Hugging Face's interface. It must not import the engine.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.models.attention import Layout, PackedLayout, require_attention
from gearshift.models.describe import trunk_of


def hf_hidden(model: PreTrainedModel, batch: PackedBatch, layout: Layout | None = None) -> Tensor:
    """[T, H] last hidden states of the packed tokens. There is no padding, and no token sees
    another sequence. `layout` replaces the batch's own attention layout if it is given.
    """
    require_attention(model)
    out = trunk_of(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        layout=layout or PackedLayout(batch),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the model has a dropout above 0, in training or in evaluation mode."""
    dropped = any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    return dropped or _attention_dropout(model) > 0


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Whether a dropout above 0 is active in the model's present mode."""
    dropped = any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    return dropped or bool(model.training and _attention_dropout(model))


def _attention_dropout(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
