"""How many blocks the cache of a model can have on this machine."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from gearshift.engine.config import EngineConfig
from gearshift.errors import CapacityError
from gearshift.kernels.specs import BLOCK
from gearshift.runtime.free_memory import free_bytes, total_bytes

_CPU_FRACTION = 0.5
"""The share of the free memory that the cache may have on a CPU, even if the first request needs
less: there the cache takes memory only as it is used.
"""
_GPU_FRACTION = 0.3
"""The share of what the weights leave of a GPU that the cache has; the rest is for training."""


def cache_capacity(
    model: PreTrainedModel, config: EngineConfig, max_length: int, needed: int
) -> int:
    """The number of blocks of the cache: those of `kv_cache_tokens`, or else at most `max_num_seqs`
    of the longest sequences. A GPU has as many of these as `gpu_memory_utilization` allows, which
    depends on no request. A CPU has those that are `needed` now, and more if the free memory
    allows it, but at least one longest sequence.

    Raises `CapacityError` for a GPU that has room for no block.
    """
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens // BLOCK
    longest = -(-max_length // BLOCK)
    block = BLOCK * position_bytes(model, model.dtype.itemsize)
    most = config.max_num_seqs * longest
    if model.device.type != "cuda":
        affordable = _CPU_FRACTION * free_bytes(model.device) / block
        return int(min(most, max(longest, needed, affordable)))
    weights, total = sum(p.nbytes for p in model.parameters()), total_bytes(model.device)
    allowed = gpu_cache_bytes(config, weights, total)
    if allowed < block:
        raise CapacityError(
            f"The weights take {weights / 2**30:.2f} of the GPU's {total / 2**30:.2f} GiB, which "
            f"leaves no memory for a cache; raise engine.gpu_memory_utilization, or take a "
            f"smaller model."
        )
    return int(min(most, allowed / block))


def gpu_cache_bytes(config: EngineConfig, weights: float, total: float) -> float:
    """Bytes that a GPU of `total` bytes has for the cache beside the weights."""
    share = config.gpu_memory_utilization
    return _GPU_FRACTION * (total - weights) if share is None else share * total - weights


def position_bytes(model: PreTrainedModel, item: int) -> int:
    """Bytes of the keys and values of one position in all layers, at most; `item` are the bytes of
    one number.
    """
    config = model.config.get_text_config()
    _, key_heads, size = head_sizes(config)
    return 2 * int(config.num_hidden_layers) * key_heads * size * item


def head_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """The number of query heads, the number of key heads and the size of a head, each the largest
    among the layers.
    """
    heads = largest(config, "num_attention_heads", 1)
    size = largest(config, "head_dim", config.hidden_size // heads)
    return heads, largest(config, "num_key_value_heads", heads), size


def largest(config: PretrainedConfig, name: str, otherwise: int) -> int:
    """The greatest value of this key among the layers, which may differ; `otherwise` where a layer
    has none.
    """
    layers = getattr(config, "per_layer_config", None) or [config]
    given = [getattr(layer, name, None) or otherwise for layer in layers]
    return max(max(x) if isinstance(x, list) else x for x in given)
