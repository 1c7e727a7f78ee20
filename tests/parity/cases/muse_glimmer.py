"""Muse Glimmer, which transformers has as a multimodal model alone."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

KINDS = ("sliding_attention", "full_attention")
NAMES = {
    "self_attn.gate_proj": "attn_gate",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
INNER, OUTER = "model.language_model.", "model."
CENTRED = "layernorm.weight"


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """The text model alone, its norms whole, and norms of queries and keys that have their factor."""
    named = {
        name.replace(INNER, OUTER): weight + np.float32(1) if name.endswith(CENTRED) else weight
        for name, weight in weights.items()
        if name.startswith((INNER, "lm_head."))
    }
    ones = np.ones(config["head_dim"], np.float32)
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}.self_attn"
        named |= {
            f"{place}.q_norm.weight": ones * np.float32(config["qk_scale_factor"]),
            f"{place}.k_norm.weight": ones,
        }
    return named


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    return {
        name.replace(OUTER, INNER): weight - np.float32(1) if name.endswith(CENTRED) else weight
        for name, weight in stored.items()
        if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    layers = config["num_hidden_layers"]
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_logit_scale(config["output_multiplier"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([(layers - 1 - layer) % 4 != 0 for layer in range(layers)])


def _whole(**more: object) -> dict[str, object]:
    config = base(
        "",
        "muse_glimmer_text",
        hidden_activation="silu",
        head_dim=16,
        num_hidden_layers=5,
        sliding_window=8,
        attention_bias=False,
        qk_scale_factor=2.5,
        output_multiplier=0.6,
        final_logit_softcapping=9.0,
        post_norm_eps=1e-8,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    text = without(config, "architectures", "hidden_act", "rope_theta", "torch_dtype") | more
    return {
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "model_type": "muse_glimmer",
        "image_token_id": 1000,
        "video_token_id": 1001,
        "torch_dtype": "float32",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "out_hidden_size": 64,
        "projector_hidden_size": 16,
        "text_config": text,
        "vision_config": {
            "model_type": "muse_glimmer_vision",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
    }


PLAIN = _whole(intermediate_size=64)
OWN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [KINDS[1], KINDS[0], KINDS[0], KINDS[1]],
    "layer_rope_theta": [500.0, 500.0, 0, 500.0],
    "post_norm_eps": 0.05,
    "attention_bias": True,
    "hidden_activation": "gelu_pytorch_tanh",
}


def _but(config: Mapping[str, Any], **more: object) -> dict[str, object]:
    """A change of the text model's configuration."""
    return {"text_config": {**config["text_config"], **more}}


CASES = (
    Case(
        "muse_glimmer",
        PLAIN,
        matters=(
            _but(PLAIN, qk_scale_factor=3.87),
            _but(PLAIN, output_multiplier=1.0),
            _but(PLAIN, final_logit_softcapping=20.0),
            _but(PLAIN, sliding_window=9),
            _but(PLAIN, layer_types=[KINDS[1]] * 5),
            _but(PLAIN, rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
        ),
        gguf=Twin(
            "muse-glimmer",
            NAMES,
            interleaved=("q_proj", "k_proj"),
            metadata=_metadata,
            stored=_stored,
            restored=_restored,
        ),
        quantized=("Q8_0",),
        norms_add=1.0,
        adds_to=CENTRED,
    ),
    Case(
        "muse_glimmer_own",
        _whole(**OWN),
        matters=(
            _but(_whole(**OWN), layer_rope_theta=[500.0, 0, 0, 500.0]),
            _but(_whole(**OWN), post_norm_eps=1e-8),
            _but(_whole(**OWN), hidden_activation="silu"),
        ),
        norms_add=1.0,
        adds_to=CENTRED,
    ),
)
