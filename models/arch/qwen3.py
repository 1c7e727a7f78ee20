"""Qwen3: a norm on each head's query and key, no biases unless the config asks for them.

Source: transformers' `modeling_qwen3`; llama.cpp `convert_hf_to_gguf.py`, Qwen3Model.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import layout
from models.arch.qwen2 import windows
from models.config_reader import JSON, ConfigReader
from models.ops import Norm


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, windows(config, dims))
    return blocks.model(dims, blocks.decoder(dims, layers(config, dims)), specs)


def layers(config: Mapping[str, JSON], dims: blocks.Dims) -> list[blocks.Layer]:
    """Declare all layers. Raises CheckpointError."""
    bias = ConfigReader(config).flag("attention_bias", default=False)
    return [layer(dims, index, bias=bias) for index in range(dims.num_layers)]


def layer(dims: blocks.Dims, index: int, *, bias: bool) -> blocks.Layer:
    """Declare a layer."""
    name = f"model.layers.{index}"
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_norm", dims.head_dim, dims.eps) for part in "qk")
    attention = replace(blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), q_norm=q_norm, k_norm=k_norm)
    return blocks.Layer(norm1, attention, norm2, blocks.mlp(dims, name))


ARCHITECTURE = Architecture(
    hf=("Qwen3ForCausalLM",),
    gguf=(
        layout(
            "qwen3",
            hf="Qwen3ForCausalLM",
            model_type="qwen3",
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
        ),
    ),
    build=build,
)
