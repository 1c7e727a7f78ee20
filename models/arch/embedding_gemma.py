"""EmbeddingGemma: a Gemma 3 whose tokens see the whole text, and half of a window to each side.

Source: transformers' `modeling_gemma3` with `use_bidirectional_attention`; llama.cpp `conversion/gemma.py`,
EmbeddingGemma; ollama v0.24.0 model/models/gemma3/embed.go for the names in its own files.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, gemma3, gguf
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    if not ConfigReader(config).flag("use_bidirectional_attention", default=False):
        raise CheckpointError("use_bidirectional_attention must be true for embeddings of a Gemma 3", file=blocks.FILE)
    return replace(gemma3.build_with(config, bidirectional=True), logits=None, state=())


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    return gemma3.gguf_config(metadata) | {"use_bidirectional_attention": True}


ARCHITECTURE = Architecture(
    hf=("Gemma3TextModel",),
    gguf=(
        gemma3.layout("gemma-embedding", hf="Gemma3TextModel", config=_gguf_config, dense=("dense_2", "dense_3")),
        gemma3.layout(
            "gemma3", hf="Gemma3TextModel", config=_gguf_config, applies=gemma3.pools, dense=("dense.0", "dense.1")
        ),
    ),
    build=build,
    is_encoder=True,
)
