"""Llama 4: with values of its own throughout, as published, and with other parts."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

KINDS = ("chunked_attention", "full_attention")
NAMES = {
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.experts.gate_proj": "ffn_gate_exps",
    "feed_forward.experts.up_proj": "ffn_up_exps",
    "feed_forward.experts.down_proj": "ffn_down_exps",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Gate and up apart, matrices (outputs, inputs)."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, last = name.rpartition(".")
        if weight.ndim < 3:
            made[name] = weight
            continue
        parts = {"gate_proj": weight[..., : weight.shape[2] // 2], "up_proj": weight[..., weight.shape[2] // 2 :]}
        for part, own in parts.items() if last == "gate_up_proj" else ((last, weight),):
            made[f"{stem}.{part}.weight"] = np.ascontiguousarray(own.swapaxes(1, 2))
    return made


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in stored.items():
        stem, marker, last = name.partition(".experts.")
        if not marker:
            made[name] = weight
        elif last == "down_proj.weight":
            made[f"{stem}.experts.down_proj"] = np.ascontiguousarray(weight.swapaxes(1, 2))
        elif last == "gate_proj.weight":
            both = [weight, stored[f"{stem}.experts.up_proj.weight"]]
            made[f"{stem}.experts.gate_up_proj"] = np.ascontiguousarray(np.concatenate(both, 1).swapaxes(1, 2))
    return made


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])


def _llama4(**more: object) -> dict[str, object]:
    return base(
        "Llama4ForCausalLM",
        "llama4_text",
        num_hidden_layers=4,
        head_dim=16,
        rope_theta=500.0,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_local_experts=5,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attn_temperature_tuning=True,
        attention_bias=False,
        use_qk_norm=True,
        output_router_logits=False,
        **more,
    )


OWN = _llama4() | {
    "num_hidden_layers": 5,
    "num_experts_per_tok": 2,
    "moe_layers": [0, 3],
    "no_rope_layers": [1, 0, 1, 0, 1],
    "layer_types": [KINDS[0], KINDS[1], KINDS[1], KINDS[0], KINDS[0]],
    "attention_chunk_size": 8,
    "floor_scale": 6,
    "attn_scale": 0.7,
    "attention_bias": True,
    "hidden_act": "gelu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = _llama4(rope_scaling=LLAMA3) | {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}

CASES = (
    Case(
        "llama4",
        OWN,
        matters=(
            {"num_experts_per_tok": 1},
            {"layer_types": [KINDS[1]] * 5},
            {"no_rope_layers": [1, 0, 1, 1, 1]},
            {"attention_chunk_size": 9},
            {"floor_scale": 7},
            {"attn_scale": 0.1},
            {"attn_temperature_tuning": False},
            {"use_qk_norm": False},
            {"hidden_act": "silu"},
        ),
    ),
    Case(
        # llama.cpp takes chunks, temperatures and layers without positions for granted.
        "llama4_plain",
        PLAIN,
        matters=({"rope_scaling": None}, {"no_rope_layer_interval": 3}),
        gguf=Twin("llama4", NAMES, metadata=_metadata, stored=_stored, restored=_restored),
        quantized=("Q8_0",),
    ),
    Case(
        "llama4_vision",
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": 290,
            "eoi_token_index": 291,
            "image_token_index": 292,
            "torch_dtype": "float32",
            "tie_word_embeddings": False,
            "text_config": without(PLAIN, "architectures", "torch_dtype")
            | {"interleave_moe_layer_step": 1, "num_hidden_layers": 2, "attention_chunk_size": 8, "use_qk_norm": False},
            "vision_config": VISION,
        },
    ),
)
