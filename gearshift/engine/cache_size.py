"""How many blocks the cache of a model can have on this machine."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from gearshift.engine.config import EngineConfig
from gearshift.kernels.specs import BLOCK
from gearshift.runtime.free_memory import free_bytes

_CPU_FRACTION, GPU_FRACTION = 0.5, 0.1
"""The share of the free memory that the cache may have, even if the first request needs less. On a
CPU the cache takes memory only as it is used; on a GPU it takes all of it at once.
"""


def cache_capacity(
    model: PreTrainedModel, config: EngineConfig, max_length: int, needed: int
) -> int:
    """The number of blocks for `kv_cache_tokens`. If that is null: those that are `needed` now, and
    more if the free memory allows it, up to `max_num_seqs` of the longest sequences and at least
    one.
    """
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens // BLOCK
    longest = -(-max_length // BLOCK)
    fraction = _CPU_FRACTION if model.device.type == "cpu" else GPU_FRACTION
    affordable = fraction * free_bytes(model.device) / (BLOCK * position_bytes(model))
    return int(min(config.max_num_seqs * longest, max(longest, needed, affordable)))


def position_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one position in all layers, at most."""
    config = model.config.get_text_config()
    heads = largest(config, "num_attention_heads", 1)
    size = largest(config, "head_dim", config.hidden_size // heads)
    key_heads = largest(config, "num_key_value_heads", heads)
    return 2 * int(config.num_hidden_layers) * key_heads * size * model.dtype.itemsize


def largest(config: PretrainedConfig, name: str, otherwise: int) -> int:
    """The greatest value of this key among the layers, which may differ; `otherwise` where a layer
    has none.
    """
    layers = getattr(config, "per_layer_config", None) or [config]
    given = [getattr(layer, name, None) or otherwise for layer in layers]
    return max(max(x) if isinstance(x, list) else x for x in given)
