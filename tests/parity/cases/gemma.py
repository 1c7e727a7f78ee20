"""Gemma 2 and Gemma 3."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without

NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_softcaps_and_window(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    if scores := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(scores)
    if logits := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(logits)
    writer.add_sliding_window(config["sliding_window"])


def write_windows(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_softcaps_and_window(writer, config)
    writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])
    every, layers = config["sliding_window_pattern"], config["num_hidden_layers"]
    writer.add_sliding_window_pattern([(layer + 1) % every != 0 for layer in range(layers)])


def _gemma(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    config = base(
        architecture,
        model_type,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        attention_bias=False,
        tie_word_embeddings=True,
    )
    return config | more


def _gemma2(**more: object) -> dict[str, object]:
    softcaps = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 9.0}
    return _gemma("Gemma2ForCausalLM", "gemma2", **{"num_hidden_layers": 4} | softcaps | more)


def _gemma3(**more: object) -> dict[str, object]:
    more = {"rope_theta": 500.0, "rope_local_base_freq": 100.0} | more
    return _gemma("Gemma3ForCausalLM", "gemma3_text", **more)


LINEAR = {"rope_type": "linear", "factor": 2.5}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}

CASES = (
    Case(
        "gemma2",
        _gemma2(intermediate_size=64),
        matters=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"sliding_window": 9},
            {"query_pre_attn_scalar": 8},
            {"hidden_activation": "silu"},
            {"rope_theta": 500.0},
        ),
        gguf=Twin("gemma2", NORMS, metadata=write_softcaps_and_window, norm_shift=1.0),
        quantized=("Q8_0",),
        norms_add=1.0,
    ),
    Case(
        "gemma2_layer_types",
        _gemma2(
            num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            query_pre_attn_scalar=9,
            hidden_activation="gelu",
            attention_bias=True,
            tie_word_embeddings=False,
        ),
        matters=({"layer_types": None}, {"hidden_activation": "silu"}, {"query_pre_attn_scalar": 16}),
        norms_add=1.0,
    ),
    Case(
        "gemma3",
        _gemma3(
            num_hidden_layers=6,
            intermediate_size=64,
            rope_theta=1000.0,
            rope_local_base_freq=10000.0,
            rope_scaling=LINEAR,
            sliding_window_pattern=6,
        ),
        matters=(
            {"rope_scaling": None},
            {"rope_theta": 1_000_000.0},
            {"rope_local_base_freq": 1000.0},
            {"sliding_window": 9},
            {"sliding_window_pattern": 5},
        ),
        gguf=Twin("gemma3", NORMS, metadata=write_softcaps_and_window, norm_shift=1.0),
        quantized=("Q8_0",),
        norms_add=1.0,
    ),
    Case(
        "gemma3_by_kind",
        without(
            _gemma3(
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters=BY_KIND,
                final_logit_softcapping=9.0,
                query_pre_attn_scalar=11,
                attention_bias=True,
                tie_word_embeddings=False,
                use_bidirectional_attention=False,
            ),
            "rope_theta",
            "rope_local_base_freq",
        ),
        matters=(
            {"rope_parameters": BY_KIND | {"sliding_attention": BY_KIND["full_attention"]}},
            {"rope_parameters": BY_KIND | {"full_attention": BY_KIND["sliding_attention"]}},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"layer_types": ["full_attention"] * 3},
        ),
        norms_add=1.0,
    ),
    Case(
        "gemma3_vision",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": 290,
            "eoi_token_index": 291,
            "image_token_index": 292,
            "mm_tokens_per_image": 4,
            "torch_dtype": "float32",
            "text_config": without(
                _gemma3(sliding_window_pattern=2), "architectures", "tie_word_embeddings", "torch_dtype"
            ),
            "vision_config": VISION,
        },
        renamed=(
            ("model.language_model.", "language_model.model."),
            ("model.", ""),
            ("lm_head.", "language_model.lm_head."),
        ),
        norms_add=1.0,
    ),
)
