"""Key-value caches: one object per layer and row."""

from models.cache.base import LayerCache

__all__ = ["LayerCache"]
