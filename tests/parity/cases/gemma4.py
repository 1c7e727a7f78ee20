"""Gemma 4: with layers that share keys and embeddings for each, with experts beside, and with other parts."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
TOP = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}
VECTORS = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}
ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
KINDS = ("sliding_attention", "full_attention")


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        layer, _, inner = name.removeprefix("model.layers.").partition(".")
        if stem in TOP:
            made[f"{TOP[stem]}.{kind}"] = weight
        elif inner in VECTORS:
            made[f"blk.{layer}.{VECTORS[inner]}"] = weight
        elif inner in NAMES:
            made[f"{name}.weight"] = weight
        else:
            made[name] = weight
    return made


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    tops = {theirs: ours for ours, theirs in TOP.items()}
    vectors = {theirs: ours for ours, theirs in VECTORS.items()}
    made: Arrays = {}
    for name, weight in stored.items():
        stem, _, kind = name.rpartition(".")
        if stem in tops:
            made[f"{tops[stem]}.{kind}"] = weight
        elif name.startswith("blk."):
            _, layer, inner = name.split(".", 2)
            made[f"model.layers.{layer}.{vectors[inner]}"] = weight
        elif stem.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[stem] = weight
        else:
            made[name] = weight
    return made


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    types = config["layer_types"]
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in types])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    own = len(types) - config["num_kv_shared_layers"]
    if config["use_double_wide_mlp"]:
        widths = [config["intermediate_size"] * (1 + (layer >= own)) for layer in range(len(types))]
        writer.add_feed_forward_length(widths)
    if heads := config["num_global_key_value_heads"]:
        counts = {"full_attention": heads, "sliding_attention": config["num_key_value_heads"]}
        writer.add_head_count_kv([counts[kind] for kind in types])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    if softcap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(softcap)
    if config["enable_moe_block"]:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


TWIN = Twin("gemma4", NAMES, metadata=_metadata, stored=_stored, restored=_restored)


def _gemma4(**more: object) -> dict[str, object]:
    config = base(
        "Gemma4ForCausalLM",
        "gemma4_text",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=None,
        sliding_window=8,
        attention_bias=False,
        attention_k_eq_v=False,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=300,
        enable_moe_block=False,
        use_double_wide_mlp=False,
        use_bidirectional_attention=None,
        num_experts=None,
        top_k_experts=None,
        moe_intermediate_size=None,
        rope_parameters=ROPES,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
    )
    return without(config, "rope_theta", "hidden_act") | more


SHARED = _gemma4(
    num_hidden_layers=6,
    layer_types=[KINDS[0], KINDS[0], KINDS[1], KINDS[0], KINDS[0], KINDS[1]],
    intermediate_size=64,
    num_kv_shared_layers=3,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=32,
    final_logit_softcapping=9.0,
    use_bidirectional_attention="vision",
)
EXPERTS = _gemma4(
    num_hidden_layers=3,
    layer_types=[KINDS[1], KINDS[0], KINDS[1]],
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    enable_moe_block=True,
    num_experts=6,
    top_k_experts=3,
    moe_intermediate_size=24,
    hidden_activation="gelu",
    attention_bias=True,
    tie_word_embeddings=False,
)
UNIFIED = without(
    _gemma4(
        architectures=["Gemma4UnifiedForCausalLM"],
        model_type="gemma4_unified_text",
        num_hidden_layers=4,
        layer_types=[*KINDS, *KINDS],
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=1,
        final_logit_softcapping=9.0,
        use_bidirectional_attention="vision",
    ),
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "enable_moe_block",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
)
NO_PROMPTS_TOKENS = {
    "boi_token_id": 1000,
    "eoi_token_id": 1001,
    "image_token_id": 1002,
    "video_token_id": 1003,
    "audio_token_id": 1004,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 8,
}

CASES = (
    Case(
        "gemma4",
        SHARED,
        matters=(
            {"final_logit_softcapping": None},
            {"sliding_window": 9},
            {"hidden_activation": "silu"},
            {"rope_parameters": ROPES | {"full_attention": ROPES["sliding_attention"]}},
            {"rope_parameters": ROPES | {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
        ),
        gguf=TWIN,
        quantized=("Q8_0",),
    ),
    Case(
        "gemma4_experts",
        EXPERTS,
        matters=(
            {"top_k_experts": 2},
            {"hidden_activation": "silu"},
            {"sliding_window": 9},
        ),
        gguf=None,  # llama.cpp has no biases for it; gemma4_experts_tied has a twin.
    ),
    Case(
        "gemma4_experts_tied",
        EXPERTS | {"attention_bias": False, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
        gguf=TWIN,
    ),
    Case(
        "gemma4_vision",
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            **NO_PROMPTS_TOKENS,
            "torch_dtype": "float32",
            "audio_config": None,
            "text_config": without(SHARED, "architectures", "tie_word_embeddings", "torch_dtype")
            | {
                "num_hidden_layers": 4,
                "layer_types": [*KINDS, *KINDS],
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 8,
                "intermediate_size": 40,
                "use_double_wide_mlp": False,
            },
            "vision_config": VISION,
        },
    ),
    # llama.cpp writes these as a Gemma 4.
    Case("gemma4_unified", UNIFIED, matters=({"final_logit_softcapping": None}, {"sliding_window": 9})),
    Case(
        "gemma4_unified_vision",
        {
            "architectures": ["Gemma4UnifiedForConditionalGeneration"],
            "model_type": "gemma4_unified",
            **NO_PROMPTS_TOKENS,
            "torch_dtype": "float32",
            "audio_config": None,
            "text_config": without(UNIFIED, "architectures", "tie_word_embeddings", "torch_dtype"),
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 16,
                "mm_posemb_size": 8,
                "output_proj_dims": 16,
            },
        },
        renamed=(
            ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
            ("model.embed_vision.", "model.vision_embedder."),
        ),
    ),
)
