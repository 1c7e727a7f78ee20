"""Llama, and the models that are Llamas in all but name: Mistral (with a sliding window) and SmolLM2.

Source: transformers' `modeling_llama` and `modeling_mistral`; llama.cpp `convert_hf_to_gguf.py`, LlamaModel.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    bias, mlp_bias = reader.flag("attention_bias", default=False), reader.flag("mlp_bias", default=False)
    is_mistral = "MistralForCausalLM" in (reader.texts("architectures") or [])
    windows = blocks.read_windows(config) if is_mistral else (None,) * dims.num_layers
    specs = blocks.attention_specs(config, dims, windows)
    layers = [blocks.layer(dims, index, bias=bias, mlp_bias=mlp_bias) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


ARCHITECTURE = Architecture(
    hf=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf=(
        blocks.gguf_names("llama", hf="LlamaForCausalLM", model_type="llama", interleaved=("attn_q", "attn_k")),
        blocks.gguf_names("mistral", hf="MistralForCausalLM", model_type="mistral", interleaved=("attn_q", "attn_k")),
    ),
    build=build,
)
