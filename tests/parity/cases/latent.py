"""Latent attention: DeepSeek-V2, DeepSeek-V3, GLM-4.7-Flash."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.moe import EXPERT_NAMES, one_by_one, stacked, unstacked

LAYER = EXPERT_NAMES | {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Experts stacked; keys and values of each head apart, the keys turned; the bias under a name of its own."""
    key, value = config["qk_nope_head_dim"], config["v_head_dim"]
    made: Arrays = {}
    for name, weight in stacked(weights, config).items():
        if name.endswith("kv_b_proj.weight"):
            whole = weight.reshape(-1, key + value, weight.shape[1])
            stem = name.removesuffix("kv_b_proj.weight")
            made[f"{stem}k_b_proj.weight"] = np.ascontiguousarray(whole[:, :key].swapaxes(1, 2))
            made[f"{stem}v_b_proj.weight"] = np.ascontiguousarray(whole[:, key:])
        elif name.endswith("e_score_correction_bias"):
            made[name.replace("_bias", ".bias")] = weight
        else:
            made[name] = weight
    return made


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    absorbed = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    writer.add_key_length(absorbed)
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if "rope_scaling" in config:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_scaling"]["mscale_all_dim"])


def _metadata_v3(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _metadata(writer, config)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


def _latent(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    config = base(
        architecture,
        model_type,
        num_hidden_layers=3,
        num_key_value_heads=4,
        kv_lora_rank=24,
        q_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        routed_scaling_factor=1.7,
        attention_bias=False,
    )
    return config | more


YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
V3 = _latent(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    num_nextn_predict_layers=1,
)
V2 = _latent(
    "DeepseekV2ForCausalLM", "deepseek_v2", norm_topk_prob=False, topk_method="greedy", n_group=1, topk_group=1
)

CASES = (
    Case(
        "deepseek_v3",
        V3,
        matters=(
            {"norm_topk_prob": False},
            {"topk_group": 4},
            {"routed_scaling_factor": 1.0},
            {"first_k_dense_replace": 1, "rope_interleave": False},
        ),
        published=one_by_one,
        gguf=Twin("deepseek2", layer=LAYER, metadata=_metadata_v3, stored=_stored, restored=unstacked),
    ),
    Case(
        "deepseek_v3_yarn",
        V3 | {"rope_scaling": YARN, "rope_theta": 500.0, "norm_topk_prob": False, "q_lora_rank": None},
        matters=({"rope_scaling": YARN | {"mscale_all_dim": 0.0}}, {"rope_scaling": None}),
        published=one_by_one,
    ),
    Case(
        "deepseek_v2",
        V2 | {"q_lora_rank": None, "rope_scaling": YARN},
        matters=({"routed_scaling_factor": 1.0}, {"rope_scaling": None}),
        published=one_by_one,
        gguf=Twin("deepseek2", layer=LAYER, metadata=_metadata, stored=_stored, restored=unstacked),
    ),
    Case(
        "deepseek_v2_groups",
        V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True},
        matters=({"topk_group": 4}, {"topk_method": "greedy"}),
        published=one_by_one,
    ),
    Case(
        "glm4_moe_lite",
        without(
            _latent("Glm4MoeLiteForCausalLM", "glm4_moe_lite", n_group=1, topk_group=1, norm_topk_prob=True)
            | {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_nextn_predict_layers": 1, "v_head_dim": 16},
            "first_k_dense_replace",
        ),
        matters=({"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}),
        published=one_by_one,
    ),
)
