"""OLMoE: norms over all heads together, and experts chosen by softmax.

Source: transformers' `modeling_olmoe`; llama.cpp `convert_hf_to_gguf.py`, OlmoeModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, STACKS, experts
from models.arch.gguf import Config, decoder_config, layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Norm, Routing


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    if config.get("clip_qkv") is not None:
        raise CheckpointError("clip_qkv is not supported", file=blocks.FILE)
    specs = blocks.attention_specs(config, dims, (None,) * dims.num_layers)
    layers = [_layer(reader, dims, f"model.layers.{index}") for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS)


def _layer(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.Layer:
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    bias = reader.flag("attention_bias", default=False)
    q_norm, k_norm = (
        Norm(f"{name}.self_attn.{part}_norm", heads * dims.head_dim, dims.eps)
        for part, heads in (("q", dims.num_heads), ("k", dims.num_kv_heads))
    )
    attention = replace(blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), q_norm=q_norm, k_norm=k_norm)
    return blocks.Layer(norm1, attention, norm2, _moe(reader, dims, f"{name}.mlp"))


def _moe(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.MoE:
    count = reader.size("num_experts", 64)
    normalized = reader.flag("norm_topk_prob", default=False)
    routing = Routing(reader.count("num_experts_per_tok", count, 8), normalized=normalized)
    own = experts(name, count, dims.hidden_size, dims.intermediate_size)
    return blocks.MoE(Linear(f"{name}.gate", dims.hidden_size, count), own, routing)


def _config(metadata: GGUFMetadata) -> Config:
    return decoder_config(metadata) | {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
    }


ARCHITECTURE = Architecture(
    hf=("OlmoeForCausalLM",),
    gguf=(
        layout(
            "olmoe",
            hf="OlmoeForCausalLM",
            model_type="olmoe",
            config=_config,
            names=GGUF_NAMES,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
        ),
    ),
    build=build,
)
