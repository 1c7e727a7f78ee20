"""EmbeddingGemma: a Gemma 3 whose tokens see the whole text, and half of a window to each side.

Source: transformers' `modeling_gemma3` with `use_bidirectional_attention`.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, gemma3
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    if not ConfigReader(config).flag("use_bidirectional_attention", default=False):
        raise CheckpointError("use_bidirectional_attention must be true for embeddings of a Gemma 3", file=blocks.FILE)
    return replace(gemma3.build_with(config, bidirectional=True), logits=None, state=())


ARCHITECTURE = Architecture(
    hf=("Gemma3TextModel",),
    gguf=(),
    build=build,
    without_gguf="the dense layers of its GGUF files are not read yet",
    is_encoder=True,
)
