"""Embeddings: what a checkpoint says of how a text becomes one vector, and that done."""

from models.embedding.model import EmbeddingModel, NotFinite, Vector
from models.embedding.settings import POOLINGS, EmbeddingSettings, Pooling, embedding_config, read_settings

__all__ = [
    "POOLINGS",
    "EmbeddingModel",
    "EmbeddingSettings",
    "NotFinite",
    "Pooling",
    "Vector",
    "embedding_config",
    "read_settings",
]
