"""Cohere2-MoE."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without
from cases.moe import EXPERT_NAMES, one_by_one, stacked, unstacked

KINDS = ("sliding_attention", "full_attention")
SHARED = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    slides = [n >= dense and (n - dense + 1) % config["sliding_window_pattern"] != 0 for n in range(layers)]
    writer.add_logit_scale(config["logit_scale"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(slides)
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"] * config["num_shared_experts"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _cohere(**more: object) -> dict[str, object]:
    config = base(
        "Cohere2MoeForCausalLM",
        "cohere2_moe",
        head_dim=16,
        intermediate_size=32,
        layer_norm_eps=1e-3,
        logit_scale=1.75,
        rope_theta=500.0,
        sliding_window=8,
        num_experts=5,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    return without(config, "rms_norm_eps") | more


CASES = (
    Case(
        "cohere2_moe",
        _cohere(
            num_hidden_layers=4,
            first_k_dense_replace=1,
            prefix_dense_intermediate_size=64,
            prefix_dense_sliding_window_pattern=1,
            sliding_window_pattern=3,
            expert_selection_fn="sigmoid",
            norm_topk_prob=True,
            num_shared_experts=2,
            shared_expert_combination_strategy="average",
            use_parallel_block=True,
            use_qk_norm=False,
        ),
        published=one_by_one,
        matters=(
            {"logit_scale": 1.0},
            {"sliding_window": 9},
            {"sliding_window_pattern": 4},
            {"layer_norm_eps": 0.1},
            {"num_experts_per_tok": 1},
            {"expert_selection_fn": "softmax"},
            {"norm_topk_prob": False},
            {"shared_expert_combination_strategy": "sum"},
        ),
        gguf=Twin("cohere2moe", layer=EXPERT_NAMES | SHARED, metadata=_metadata, stored=stacked, restored=unstacked),
        quantized=("Q8_0",),
    ),
    Case(
        "cohere2_moe_rms",
        _cohere(
            num_hidden_layers=4,
            layer_types=[KINDS[1], KINDS[0], KINDS[1], KINDS[0]],
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            prefix_dense_sliding_window_pattern=2,
            rms_norm_eps=1e-3,
            expert_selection_fn="softmax",
            num_shared_experts=1,
            shared_expert_combination_strategy="sum",
            attention_bias=True,
            hidden_act="gelu",
            tie_word_embeddings=False,
        ),
        matters=(
            {"rms_norm_eps": None},
            {"prefix_dense_sliding_window_pattern": 1},
            {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "layer_types": [KINDS[0]] * 4},
            {"hidden_act": "silu"},
        ),
    ),
)
