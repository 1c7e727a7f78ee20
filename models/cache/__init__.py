"""Key-value caches: one object per layer and row."""

from models.cache.base import LayerCache, Segment
from models.cache.kv import KVCache, cache_nbytes

__all__ = ["KVCache", "LayerCache", "Segment", "cache_nbytes"]
