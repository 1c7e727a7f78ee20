"""Qwen2-MoE: a Qwen2 whose MLPs are mixtures of experts beside one that all tokens go through.

Source: transformers' `modeling_qwen2_moe`; llama.cpp `convert_hf_to_gguf.py`, Qwen2MoeModel.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, GGUF_SHARED, STACKS, is_sparse, mixture_beside_one
from models.arch.gguf import Config, decoder_config, layout
from models.arch.qwen2 import windows
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, windows(config, dims))
    layers = [_layer(config, dims, index) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS)


def _layer(config: Mapping[str, JSON], dims: blocks.Dims, index: int) -> blocks.Layer:
    name, bias = f"model.layers.{index}", ConfigReader(config).flag("qkv_bias", default=True)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    own: blocks.MLP | blocks.MoE = blocks.mlp(dims, name)
    if is_sparse(config, index):
        own = mixture_beside_one(config, dims, f"{name}.mlp", normalized=False)
    return blocks.Layer(norm1, blocks.attention(dims, name, qkv_bias=bias), norm2, own)


def _config(metadata: GGUFMetadata) -> Config:
    return decoder_config(metadata) | {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": metadata.count("expert_shared_feed_forward_length"),
        "qkv_bias": "blk.0.attn_q.bias" in metadata.shapes,
    }


ARCHITECTURE = Architecture(
    hf=("Qwen2MoeForCausalLM",),
    gguf=(
        layout(
            "qwen2moe",
            hf="Qwen2MoeForCausalLM",
            model_type="qwen2_moe",
            config=_config,
            names=GGUF_NAMES | GGUF_SHARED,
        ),
    ),
    build=build,
)
