"""MiniMax M2: norms over all heads together, a part of each head rotated, experts chosen by sigmoid and a bias.

Source: transformers' `modeling_minimax_m2`; llama.cpp `convert_hf_to_gguf.py`, MiniMaxM2Model.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import STACKS, experts
from models.arch.gguf import Config, decoder_config, layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Norm, Routing, Vector


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    if (scoring := reader.text("scoring_func", "sigmoid")) != "sigmoid":
        raise CheckpointError(f"scoring_func {scoring!r} is not supported", file=blocks.FILE)
    if config.get("rotary_dim") is not None:
        config = {**config, "partial_rotary_factor": reader.size("rotary_dim") / dims.head_dim}
    specs = blocks.attention_specs(config, dims, (None,) * dims.num_layers, default_theta=5_000_000.0)
    layers = [_layer(reader, dims, f"model.layers.{index}") for index in range(dims.num_layers)]
    # Modules that predict further tokens are left out.
    further = tuple(f"layers.{dims.num_layers + n}." for n in range(reader.integer("num_mtp_modules", 0)))
    return replace(blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS), other_parts=further)


def _layer(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.Layer:
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    attention = blocks.attention(dims, name)
    q_norm, k_norm = (
        Norm(f"{name}.self_attn.{part}_norm", heads * dims.head_dim, dims.eps)
        for part, heads in (("q", dims.num_heads), ("k", dims.num_kv_heads))
    )
    mlp = _moe(reader, dims, f"{name}.block_sparse_moe")
    return blocks.Layer(norm1, replace(attention, q_norm=q_norm, k_norm=k_norm), norm2, mlp)


def _moe(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.MoE:
    count = reader.size("num_local_experts", 256)
    own = experts(name, count, dims.hidden_size, dims.intermediate_size, names=("w1", "w3", "w2"))
    bias = Vector(f"{name}.e_score_correction_bias", count)
    routing = Routing(reader.count("num_experts_per_tok", count, 8), score="sigmoid", bias=bias)
    return blocks.MoE(Linear(f"{name}.gate", dims.hidden_size, count), own, routing)


def _config(metadata: GGUFMetadata) -> Config:
    return decoder_config(metadata) | {
        "intermediate_size": metadata.count("expert_feed_forward_length"),
        "num_local_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
    }


ARCHITECTURE = Architecture(
    hf=("MiniMaxM2ForCausalLM",),
    gguf=(
        layout(
            "minimax-m2",
            hf="MiniMaxM2ForCausalLM",
            model_type="minimax_m2",
            bare=("exp_probs_b",),
            config=_config,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            ffn_gate_inp="block_sparse_moe.gate",
            ffn_gate_exps="block_sparse_moe.experts.*.w1",
            ffn_up_exps="block_sparse_moe.experts.*.w3",
            ffn_down_exps="block_sparse_moe.experts.*.w2",
            exp_probs_b="block_sparse_moe.e_score_correction_bias",
        ),
    ),
    build=build,
)
