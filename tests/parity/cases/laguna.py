"""Laguna."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.moe import EXPERT_NAMES, one_by_one, stacked, unstacked

KINDS = ("full_attention", "sliding_attention")
BIAS = "mlp.experts.e_score_correction_bias"
NAMES = {
    "self_attn.g_proj": "attn_gate",
    "mlp.experts.e_score_correction": "exp_probs_b",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
ROPES = {
    KINDS[0]: {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "beta_fast": 1.0,
        "beta_slow": 0.25,
        "original_max_position_embeddings": 24,
    },
    KINDS[1]: {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0},
}


def _published(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made = one_by_one(weights, config)
    renamed = {"gate.e_score_correction_bias": "experts.e_score_correction_bias", "shared_experts.": "shared_expert."}
    for ours, theirs in renamed.items():
        made = {name.replace(ours, theirs): weight for name, weight in made.items()}
    return made


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Experts stacked, the bias apart."""
    made = stacked({name: weight for name, weight in weights.items() if BIAS not in name}, config)
    biases = {name: weight for name, weight in weights.items() if BIAS in name}
    return made | {name.replace("correction_bias", "correction.bias"): weight for name, weight in biases.items()}


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    biases = {name: weight for name, weight in stored.items() if "correction.bias" in name}
    made = unstacked({name: weight for name, weight in stored.items() if name not in biases}, config)
    return made | {name.replace("correction.bias", "correction_bias"): weight for name, weight in biases.items()}


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    full, sliding = (config["rope_parameters"][kind] for kind in KINDS)
    writer.add_head_count(config["num_attention_heads_per_layer"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(int(config["head_dim"] * full["partial_rotary_factor"]))
    writer.add_rope_dimension_count_swa(int(config["head_dim"] * sliding["partial_rotary_factor"]))
    writer.add_rope_freq_base_swa(sliding["rope_theta"])
    writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["moe_routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


LAGUNA = without(
    base(
        "LagunaForCausalLM",
        "laguna",
        head_dim=32,
        num_attention_heads_per_layer=[4, 6, 2],
        layer_types=[KINDS[0], KINDS[1], KINDS[1]],
        sliding_window=8,
        gating="per-head",
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        moe_routed_scaling_factor=1.6,
        moe_apply_router_weight_on_input=False,
        rope_parameters=ROPES,
        intermediate_size=64,
    ),
    "rope_theta",
)

CASES = (
    Case(
        "laguna",
        LAGUNA,
        published=_published,
        matters=(
            {"sliding_window": 9},
            {"layer_types": [KINDS[0]] * 3},
            {"num_experts_per_tok": 1},
            {"moe_routed_scaling_factor": 1.0},
            {"rope_parameters": ROPES | {KINDS[0]: ROPES[KINDS[1]]}},
            {"rope_parameters": ROPES | {KINDS[1]: ROPES[KINDS[1]] | {"partial_rotary_factor": 0.5}}},
        ),
        gguf=Twin("laguna", EXPERT_NAMES | NAMES, metadata=_metadata, stored=_stored, restored=_restored),
        quantized=("Q8_0",),
    ),
    Case(
        "laguna_elements",
        without(LAGUNA, "mlp_layer_types", "num_attention_heads_per_layer", "layer_types", "rope_parameters")
        | {
            "gating": "per-element",
            "moe_router_logit_softcapping": 0.7,
            "attention_bias": True,
            "hidden_act": "gelu",
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        published=_published,
        matters=({"moe_router_logit_softcapping": 0.0}, {"hidden_act": "silu"}, {"rms_norm_eps": 0.1}),
    ),
)
