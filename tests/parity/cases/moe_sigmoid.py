"""More mixtures of experts: GLM-4-MoE, MiniMax M2, ERNIE 4.5 MoE, OLMoE."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Arrays, Twin

from cases.base import Case, base
from cases.moe import EXPERT_NAMES, as_mixtrals, one_by_one, stacked, unstacked, write_experts

NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def _with_bias(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Experts stacked, and the bias under a name of its own."""
    made = stacked(weights, config)
    renamed = {name.replace("e_score_correction_bias", "e_score_correction.bias"): made[name] for name in made}
    # One row is a vector there.
    return {
        name: value[0] if name.endswith("correction.bias") and value.ndim == 2 else value
        for name, value in renamed.items()
    }


def _write_glm(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_block_count(config["num_hidden_layers"] + config["num_nextn_predict_layers"])
    writer.add_nextn_predict_layers(config["num_nextn_predict_layers"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _as_ernies(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Each expert by itself, and the bias where it is published."""
    made = one_by_one(weights, config)
    return {name.replace(".gate.moe_statics.", ".moe_statics."): made[name] for name in made}


def _write_ernie(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_k"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])


def _write_minimax(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_experts(writer, config)
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


GLM = base(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    num_hidden_layers=3,
    head_dim=16,
    partial_rotary_factor=0.5,
    attention_bias=True,
    use_qk_norm=True,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    routed_scaling_factor=1.6,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    num_nextn_predict_layers=1,
)
MINIMAX = base(
    "MiniMaxM2ForCausalLM",
    "minimax_m2",
    num_hidden_layers=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=24,
    num_local_experts=6,
    num_experts_per_tok=2,
    scoring_func="sigmoid",
    use_qk_norm=True,
)
OLMOE = base(
    "OlmoeForCausalLM",
    "olmoe",
    num_hidden_layers=2,
    intermediate_size=24,
    num_experts=6,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    clip_qkv=None,
)

ERNIE = base(
    "Ernie4_5_MoeForCausalLM",
    "ernie4_5_moe",
    num_hidden_layers=3,
    use_bias=False,
    moe_num_experts=6,
    moe_k=2,
    moe_intermediate_size=16,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=-1,
    moe_layer_interval=1,
    tie_word_embeddings=True,
    rope_theta=500.0,
)

CASES = (
    Case(
        "glm4_moe",
        GLM,
        matters=({"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"partial_rotary_factor": 1.0}),
        published=one_by_one,
        gguf=Twin(
            "glm4moe",
            layer=EXPERT_NAMES
            | NORMS
            | {
                "post_attention_layernorm": "post_attention_norm",
                "mlp.gate.e_score_correction": "exp_probs_b",
                "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
                "mlp.shared_experts.up_proj": "ffn_up_shexp",
                "mlp.shared_experts.down_proj": "ffn_down_shexp",
            },
            metadata=_write_glm,
            stored=_with_bias,
            restored=unstacked,
        ),
    ),
    Case(
        "glm4_moe_plain",
        GLM | {"use_qk_norm": False, "attention_bias": False, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
        matters=({"topk_group": 4},),
        published=one_by_one,
    ),
    Case(
        "minimax_m2",
        MINIMAX,
        matters=({"num_experts_per_tok": 3}, {"rotary_dim": 16}),
        published=as_mixtrals,
        gguf=Twin(
            "minimax-m2",
            layer=NORMS
            | {
                "block_sparse_moe.gate": "ffn_gate_inp",
                "block_sparse_moe.experts.w1": "ffn_gate_exps",
                "block_sparse_moe.experts.w3": "ffn_up_exps",
                "block_sparse_moe.experts.w2": "ffn_down_exps",
                "block_sparse_moe.e_score_correction": "exp_probs_b",
            },
            metadata=_write_minimax,
            stored=_with_bias,
            restored=unstacked,
        ),
    ),
    Case(
        "ernie4_5_moe",
        ERNIE,
        matters=({"moe_k": 3}, {"rope_theta": 10000.0}),
        published=_as_ernies,
        gguf=Twin(
            "ernie4_5-moe",
            layer=EXPERT_NAMES
            | {
                "mlp.moe_statics.e_score_correction": "exp_probs_b",
                "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
                "mlp.shared_experts.up_proj": "ffn_up_shexp",
                "mlp.shared_experts.down_proj": "ffn_down_shexp",
            },
            metadata=_write_ernie,
            stored=_with_bias,
            restored=unstacked,
        ),
    ),
    Case(
        "olmoe",
        OLMOE,
        matters=({"norm_topk_prob": True},),
        published=one_by_one,
        gguf=Twin("olmoe", layer=EXPERT_NAMES | NORMS, metadata=write_experts, stored=stacked, restored=unstacked),
    ),
)
