"""LFM2, dense and with experts."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.moe import stacked, unstacked

NAMES = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
EXPERT_NAMES = {
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.experts.w1": "ffn_gate_exps",
    "feed_forward.experts.w3": "ffn_up_exps",
    "feed_forward.experts.w2": "ffn_down_exps",
    "feed_forward.expert_bias": "exp_probs_b.bias",
}


def _flat(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Kernels without the axis in the middle, experts stacked."""
    named = {name: w[:, 0] if name.endswith("conv.conv.weight") else w for name, w in weights.items()}
    return stacked(named, config)


def _back(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    named = unstacked(weights, config)
    return {name: w[:, None] if name.endswith("conv.conv.weight") else w for name, w in named.items()}


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    kv_heads = config["num_key_value_heads"]
    types = config.get("layer_types") or [
        "full_attention" if layer in config["full_attn_idxs"] else "conv"
        for layer in range(config["num_hidden_layers"])
    ]
    writer.add_head_count_kv([kv_heads if kind == "full_attention" else 0 for kind in types])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_vocab_size(config["vocab_size"])
    if "block_ff_dim" in config:
        width = int(config["block_ffn_dim_multiplier"] * int(2 * config["block_ff_dim"] / 3))
        multiple = config["block_multiple_of"]
        writer.add_feed_forward_length(multiple * ((width + multiple - 1) // multiple))
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _one_by_one(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Each expert's matrices by themselves, as published."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, last = name.rpartition(".")
        parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(last) if weight.ndim == 3 else None
        if parts is None or not stem.endswith("experts"):
            made[name] = weight
            continue
        for number, each in enumerate(weight):
            rows = np.split(each, len(parts))
            made |= {
                f"{stem}.{number}.{part}.weight": np.ascontiguousarray(own)
                for part, own in zip(parts, rows, strict=True)
            }
    return made


_SHARED = without(
    base(
        "Lfm2ForCausalLM",
        "lfm2",
        num_hidden_layers=4,
        norm_eps=1e-4,
        rope_theta=5000.0,
        conv_L_cache=4,
        conv_bias=False,
        tie_word_embeddings=True,
    ),
    "rms_norm_eps",
    "hidden_act",
)
# As the first ones are published: which layers attend by their numbers, the width before it is adjusted.
LFM2 = without(
    _SHARED
    | {
        "block_auto_adjust_ff_dim": True,
        "block_dim": 32,
        "block_ff_dim": 66,
        "block_ffn_dim_multiplier": 1.25,
        "block_multiple_of": 16,
        "block_norm_eps": 1e-5,
        "block_use_swiglu": True,
        "conv_dim": 32,
        "full_attn_idxs": [1, 3],
        "use_pos_enc": True,
    },
    "intermediate_size",
)
MOE = _SHARED | {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3,
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}

CASES = (
    Case(
        "lfm2",
        LFM2,
        matters=({"rope_theta": 1000000.0}, {"full_attn_idxs": [1, 3], "norm_eps": 1e-2}),
        gguf=Twin(
            "lfm2",
            layer=NAMES,
            top={"model.embedding_norm": "token_embd_norm"},
            metadata=_write,
            stored=_flat,
            restored=_back,
        ),
        quantized=("Q8_0",),
    ),
    Case(
        "lfm2_bias",
        without(LFM2, "full_attn_idxs", "block_ff_dim")
        | {
            "layer_types": ["full_attention", "conv", "conv", "full_attention"],
            "conv_bias": True,
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
            "intermediate_size": 40,
            "tie_embedding": True,
            "rope_parameters": {"rope_theta": 3000.0, "rope_type": "default"},
        },
        matters=({"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},),
    ),
    Case(
        "lfm2_moe",
        MOE,
        matters=(
            {"num_experts_per_tok": 3},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 1.0},
            {"rope_theta": 1000000.0},
        ),
        published=_one_by_one,
    ),
    Case(
        # llama.cpp takes the published choice of experts for granted.
        "lfm2_moe_plain",
        MOE | {"routed_scaling_factor": 1.0, "num_dense_layers": 2},
        published=_one_by_one,
        gguf=Twin(
            "lfm2moe",
            layer=NAMES | EXPERT_NAMES,
            top={"model.embedding_norm": "token_embd_norm"},
            metadata=_write,
            stored=_flat,
            restored=_back,
        ),
    ),
)
