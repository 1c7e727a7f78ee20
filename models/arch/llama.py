"""Llama, and the models that are Llamas in all but name: Mistral (with a sliding window) and SmolLM2.

Source: transformers' `modeling_llama` and `modeling_mistral`; llama.cpp `convert_hf_to_gguf.py`, LlamaModel.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import layout
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    bias, mlp_bias = reader.flag("attention_bias", default=False), reader.flag("mlp_bias", default=False)
    is_mistral = "MistralForCausalLM" in (reader.texts("architectures") or [])
    windows = blocks.read_windows(config) if is_mistral else (None,) * dims.num_layers
    specs = blocks.attention_specs(config, dims, windows)
    layers = [blocks.layer(dims, index, bias=bias, mlp_bias=mlp_bias) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


def _has_window(metadata: GGUFMetadata) -> bool:
    """llama.cpp writes a Mistral as a Llama; only Mistral has a window."""
    return bool(metadata.integer("attention.sliding_window"))


def _is_dense(metadata: GGUFMetadata) -> bool:
    """llama.cpp writes a Mixtral as a Llama with experts."""
    return not metadata.integer("expert_count")


_ROTATED = ("attn_q", "attn_k")

ARCHITECTURE = Architecture(
    hf=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf=(
        layout("llama", hf="MistralForCausalLM", model_type="mistral", interleaved=_ROTATED, applies=_has_window),
        layout("llama", hf="LlamaForCausalLM", model_type="llama", interleaved=_ROTATED, applies=_is_dense),
        layout("mistral", hf="MistralForCausalLM", model_type="mistral", interleaved=_ROTATED),
    ),
    build=build,
)
