"""Key-value caches: one object per layer and row."""

from models.cache.base import LayerCache, SeenOnHost, Segment
from models.cache.kinds import CACHE_TYPES, CacheType, cache_nbytes, check_cache_type, layer_cache
from models.cache.kv import KVCache
from models.cache.quantized import QuantizedKVCache

__all__ = [
    "CACHE_TYPES",
    "CacheType",
    "KVCache",
    "LayerCache",
    "QuantizedKVCache",
    "SeenOnHost",
    "Segment",
    "cache_nbytes",
    "check_cache_type",
    "layer_cache",
]
