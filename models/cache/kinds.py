"""The kinds of cache that a user can choose from, by Ollama's names, and what each takes."""

from typing import Literal, TypeAlias, get_args

from models.cache.base import LayerCache
from models.cache.kv import KVCache, held_tokens
from models.cache.quantized import GROUP_SIZE, QuantizedKVCache
from models.errors import QuantizationError

CacheType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
CACHE_TYPES: tuple[CacheType, ...] = get_args(CacheType)
"""f16 is not quantised: whatever the model computes in."""

_BITS: dict[CacheType, int] = {"q8_0": 8, "q4_0": 4}


def check_cache_type(cache_type: CacheType, head_dim: int) -> None:
    """Refuse what cannot be packed.

    Raises:
        QuantizationError: the head dimension is no whole number of groups.
    """
    if cache_type in _BITS and head_dim % GROUP_SIZE:
        raise QuantizationError(
            f"a {cache_type} cache needs heads of a multiple of {GROUP_SIZE} dimensions, and this model's have "
            f"{head_dim}; choose the cache type f16"
        )


def layer_cache(cache_type: CacheType, window: int | None) -> LayerCache:
    """An empty cache for one layer of one row. Thread: the MLX thread."""
    bits = _BITS.get(cache_type)
    return KVCache(window) if bits is None else QuantizedKVCache(bits, window)


def cache_nbytes(
    tokens: int,
    *,
    window: int | None,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    cache_type: CacheType = "f16",
) -> int:
    """What a layer's cache of that many tokens holds, in bytes; `itemsize` is the activations' width. Thread: any."""
    bits = _BITS.get(cache_type)
    per_head = head_dim * itemsize if bits is None else head_dim * bits // 8 + 2 * (head_dim // GROUP_SIZE) * itemsize
    return 2 * kv_heads * held_tokens(tokens, window) * per_head
