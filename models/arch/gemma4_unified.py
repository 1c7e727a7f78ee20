"""Gemma 4 of the kind whose pictures and sounds go straight into the decoder: a Gemma 4 without embeddings for layers.

Source: transformers' `modeling_gemma4_unified`.
"""

from collections.abc import Mapping

from models.arch import blocks, gemma4
from models.arch.base import Architecture, Model
from models.config_reader import JSON

_DEFAULTS: Mapping[str, JSON] = {"max_position_embeddings": 262144, "sliding_window": 1024}
_LACKS: Mapping[str, JSON] = {"hidden_size_per_layer_input": 0, "enable_moe_block": False}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    return gemma4.build_with({**_LACKS, **blocks.completed(config, _DEFAULTS)}, all_look_both_ways=True)


ARCHITECTURE = Architecture(
    hf=("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    gguf=(),
    build=build,
    other_parts=("vision_embedder.", "embed_vision.", "embed_audio."),
    without_gguf="no published file was at hand; one that calls itself a Gemma 4 is read as such",
)
