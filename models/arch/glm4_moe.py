"""GLM-4-MoE (GLM-4.5 to 4.7): experts chosen by sigmoid and a bias, a part of each head rotated, norms by option.

Source: transformers' `modeling_glm4_moe`; llama.cpp `convert_hf_to_gguf.py`, Glm4MoeModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, qwen3
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, STACKS, sigmoid_moe
from models.arch.gguf import Config, decoder_config, layout
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, (None,) * dims.num_layers)
    dense = reader.integer("first_k_dense_replace", 1)
    layers = [_layer(config, dims, index, is_sparse=index >= dense) for index in range(dims.num_layers)]
    # Layers that predict further tokens are left out.
    further = [dims.num_layers + n for n in range(reader.integer("num_nextn_predict_layers", 1))]
    parts = tuple(f"{stem}.{number}." for number in further for stem in ("layers", "blk"))
    return replace(blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS), other_parts=parts)


def _layer(config: Mapping[str, JSON], dims: blocks.Dims, index: int, *, is_sparse: bool) -> blocks.Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    bias = reader.flag("attention_bias", default=False)
    attention = blocks.attention(dims, name, qkv_bias=bias)
    if reader.flag("use_qk_norm", default=False):
        normed = qwen3.layer(dims, index, bias=bias).attention
        attention = replace(attention, q_norm=normed.q_norm, k_norm=normed.k_norm)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    mlp = sigmoid_moe(config, dims, f"{name}.mlp") if is_sparse else blocks.mlp(dims, name)
    return blocks.Layer(norm1, attention, norm2, mlp)


def _config(metadata: GGUFMetadata) -> Config:
    config = decoder_config(metadata)
    further = metadata.integer("nextn_predict_layers") or 0
    return config | {
        "num_hidden_layers": metadata.count("block_count") - further,
        "num_nextn_predict_layers": further,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in metadata.shapes,
        "first_k_dense_replace": metadata.integer("leading_dense_block_count") or 0,
        "n_routed_experts": metadata.count("expert_count"),
        "n_shared_experts": metadata.integer("expert_shared_count") or 0,
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "routed_scaling_factor": metadata.real("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(metadata.flag("expert_weights_norm")),
    }


ARCHITECTURE = Architecture(
    hf=("Glm4MoeForCausalLM",),
    gguf=(
        layout(
            "glm4moe",
            hf="Glm4MoeForCausalLM",
            model_type="glm4_moe",
            bare=("exp_probs_b",),
            config=_config,
            names=GGUF_NAMES,
            post_attention_norm="post_attention_layernorm",
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            exp_probs_b="mlp.gate.e_score_correction_bias",
            ffn_gate_shexp="mlp.shared_experts.gate_proj",
            ffn_up_shexp="mlp.shared_experts.up_proj",
            ffn_down_shexp="mlp.shared_experts.down_proj",
        ),
    ),
    build=build,
)
