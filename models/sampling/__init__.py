"""Sampling: from logits to a token, on the host (`host`) and on MLX arrays (`device`); `draw` is what both are told."""

from models.sampling.draw import INVALID_TOKEN, Draw, Drawn, Sampling, TokenCounts, uniform

__all__ = ["INVALID_TOKEN", "Draw", "Drawn", "Sampling", "TokenCounts", "uniform"]
