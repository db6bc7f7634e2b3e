"""The training gear's forward: Hugging Face's own modules over packed tokens, then the fused head.

Any causal language model whose attention goes through Hugging Face's interface runs here, the
policy and the reference alike.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.models.attention import Layout, PackedLayout, require_attention
from gearshift.models.describe import head_of, trunk_of
from gearshift.models.logprobs import TokenScores, token_logprobs


def hidden_states(
    model: PreTrainedModel, batch: PackedBatch, layout: Layout | None = None
) -> Tensor:
    """[T, H] last hidden states of the packed tokens; no padding, nothing crosses sequences.
    `layout`: the attention, where it is not simply the batch's.
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


def token_scores(
    model: PreTrainedModel,
    batch: PackedBatch,
    temperature: float = 1.0,
    value_head: nn.Module | None = None,
    states: Callable[[PackedBatch], Tensor] | None = None,
) -> TokenScores:
    """Log-probs, entropy and (with `value_head`) values of the scored tokens, from one pass.

    Log-probs are under softmax(logits / temperature). Gradients flow if they are enabled. `states`
    computes the model's last hidden states, where something faster than its own modules does.
    """
    hidden_TH = hidden_states(model, batch) if states is None else states(batch)
    rows_MH = hidden_TH[batch.logit_indices]
    scores = token_logprobs(head_of(model), rows_MH, batch.targets, temperature)
    return scores if value_head is None else scores._replace(values=value_head(rows_MH))


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Whether some dropout of this model is switched on now."""
    attention = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    dropped = any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    return dropped or bool(model.training and attention)
