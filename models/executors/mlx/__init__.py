"""The executor on MLX: an architecture's forward pass, built lazily for all rows of a step at once."""

from models.executors.mlx.embedder import load_embedder
from models.executors.mlx.executor import MLXExecutor
from models.executors.mlx.loading import footprint, load
from models.executors.mlx.tower import load_tower, tower_footprint

__all__ = ["MLXExecutor", "footprint", "load", "load_embedder", "load_tower", "tower_footprint"]
