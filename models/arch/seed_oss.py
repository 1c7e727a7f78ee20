"""Seed-OSS: a Llama whose queries, keys and values have biases.

Source: transformers' `modeling_seed_oss`; llama.cpp `convert_hf_to_gguf.py` (the common part) and `tensor_mapping.py`.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, {"head_dim": 128, "max_position_embeddings": 524288})
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, [None] * dims.num_layers)
    layers = [_layer(dims, f"model.layers.{index}", reader) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


def _layer(dims: blocks.Dims, name: str, reader: ConfigReader) -> blocks.Layer:
    bias, out_bias = reader.flag("attention_bias", default=True), reader.flag("attention_out_bias", default=False)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=out_bias)
    return blocks.Layer(norm1, attention, norm2, blocks.mlp(dims, name, bias=reader.flag("mlp_bias", default=False)))


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    return gguf.decoder_config(metadata) | {"attention_out_bias": "blk.0.attn_output.bias" in metadata.shapes}


ARCHITECTURE = Architecture(
    hf=("SeedOssForCausalLM",),
    gguf=(
        gguf.layout(
            "seed_oss",
            hf="SeedOssForCausalLM",
            model_type="seed_oss",
            config=_gguf_config,
            post_attention_norm="post_attention_layernorm",
            ffn_norm="",
        ),
    ),
    build=build,
)
