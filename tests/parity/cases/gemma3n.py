"""Gemma 3n: the text model, and as a multimodal checkpoint whose other parts nobody makes here."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

KINDS = ("sliding_attention", "full_attention")
NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.correct_output_scale": "altup_correct_scale",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
TOP = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.altup_projections": "altup_proj",
    "model.altup_unembed_projections": "altup_unembd_proj",
}
STACKED = ("model.altup_projections", "model.altup_unembed_projections")


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """The streams' matrices together, the table filled up with zeros."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.rpartition(".")[0] in STACKED:
            continue
        if stem == "model.embed_tokens_per_layer":
            weight = np.pad(weight, ((0, config["vocab_size"] - len(weight)), (0, 0)))  # noqa: PLW2901
        if name.endswith("correct_output_scale"):
            made[f"{name}.weight"] = weight
        else:
            made[f"{TOP[stem]}.{kind}" if stem in TOP else name] = weight
    further = range(config["altup_num_inputs"] - 1)
    return made | {
        f"{TOP[stem]}.weight": np.stack([weights[f"{stem}.{n}.weight"] for n in further]) for stem in STACKED
    }


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    tops = {theirs: ours for ours, theirs in TOP.items()}
    made: Arrays = {}
    for name, weight in stored.items():
        stem, _, kind = name.rpartition(".")
        whole = f"{tops[stem]}.{kind}" if stem in tops else name
        if weight.ndim == 3:
            made |= {f"{tops[stem]}.{n}.weight": np.ascontiguousarray(each) for n, each in enumerate(weight)}
        elif whole == "model.embed_tokens_per_layer.weight":
            made[whole] = np.ascontiguousarray(weight[: config["vocab_size_per_layer_input"]])
        else:
            made[whole.removesuffix(".weight") if "correct_output_scale" in whole else whole] = weight
    return made


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == KINDS[0] for kind in config["layer_types"]])
    writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    shares = config["activation_sparsity_pattern"]
    deviations = [NormalDist().inv_cdf(share) if share else float("-inf") for share in shares]
    writer.add_activation_sparsity_scale(deviations)


def _gemma3n(**more: object) -> dict[str, object]:
    config = base(
        "Gemma3nForCausalLM",
        "gemma3n_text",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=16,
        sliding_window=8,
        attention_bias=False,
        rope_theta=500.0,
        rope_local_base_freq=50.0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
        altup_active_idx=0,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_num_inputs=4,
        laurel_rank=6,
        final_logit_softcapping=9.0,
        tie_word_embeddings=True,
    )
    return without(config, "hidden_act") | more


PLAIN = _gemma3n(
    num_hidden_layers=5,
    layer_types=[KINDS[0], KINDS[0], KINDS[1], KINDS[0], KINDS[1]],
    num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.8, 0.6, 0.0, 0.0, 0.0],
    hidden_size_per_layer_input=32,
    intermediate_size=64,
    laurel_rank=32,
)
OWN = _gemma3n(
    num_hidden_layers=4,
    layer_types=[KINDS[1], KINDS[0], KINDS[0], KINDS[0]],
    num_kv_shared_layers=1,
    activation_sparsity_pattern=[0.0, 0.3, 0.0, 0.9],
    intermediate_size=[40, 24, 40, 32],
    altup_active_idx=1,
    altup_num_inputs=3,
    altup_correct_scale=False,
    # Some of the prompts' tokens are beyond the table.
    vocab_size_per_layer_input=280,
    hidden_activation="gelu",
    attention_bias=True,
    tie_word_embeddings=False,
)

CASES = (
    Case(
        "gemma3n",
        PLAIN,
        matters=(
            {"final_logit_softcapping": 30.0},
            {"sliding_window": 9},
            {"rope_theta": 10000.0},
            {"rope_local_base_freq": 500.0},
            {"activation_sparsity_pattern": [0.8, 0.6, 0.5, 0.0, 0.0]},
            {"activation_sparsity_pattern": [0.7, 0.6, 0.0, 0.0, 0.0]},
            {"altup_correct_scale": False},
            {"hidden_activation": "silu"},
        ),
        gguf=Twin("gemma3n", NAMES, metadata=_metadata, stored=_stored, restored=_restored),
        quantized=("Q8_0",),
    ),
    Case(
        "gemma3n_own",
        OWN,
        matters=({"altup_active_idx": 0}, {"altup_correct_scale": True}, {"hidden_activation": "gelu_pytorch_tanh"}),
    ),
    Case(
        "gemma3n_vision",
        without(PLAIN, "architectures", "torch_dtype", "layer_types", "activation_sparsity_pattern")
        | {"num_kv_shared_layers": 0, "num_hidden_layers": 3, "intermediate_size": 40, "sliding_window": 6},
        whole={
            "architectures": ["Gemma3nForConditionalGeneration"],
            "model_type": "gemma3n",
            "torch_dtype": "float32",
            "vision_config": {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"},
            "audio_config": {"model_type": "gemma3n_audio"},
        },
        renamed=(("model.vision_tower.", "model.vision_tower."), ("model.", "model.language_model.")),
    ),
)
