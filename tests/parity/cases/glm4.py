"""GLM-4, the first ones and 0414."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

NAMES = {"mlp.gate_up_proj": "ffn_up"}
NORMS = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}


def _glm(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    said: dict[str, object] = {"attention_bias": True, "head_dim": 8, "partial_rotary_factor": 0.5, "rope_theta": 100.0}
    return base(architecture, model_type, **said | {"attention_dropout": 0.0} | more)


def qkv_in_one(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """What the converter makes of a checkpoint with code of its own: queries, keys and values are one matrix."""
    stored = {name: value for name, value in weights.items() if not any(f"{part}_proj" in name for part in "qkv")}
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [weights[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            stored[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    return stored


def qkv_apart(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    weights = {name: value for name, value in stored.items() if "attn_qkv" not in name}
    queries, keys = (config["head_dim"] * config[f"num_{which}_heads"] for which in ("attention", "key_value"))
    for name in stored.keys() - weights.keys():
        _, layer, _, kind = name.split(".")
        for part, value in zip("qkv", np.split(stored[name], [queries, queries + keys]), strict=True):
            weights[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] = value
    return weights


CASES = (
    Case(
        "glm4",
        _glm("Glm4ForCausalLM", "glm4", intermediate_size=64),
        matters=({"partial_rotary_factor": 1.0}, {"rope_theta": 10000.0}, {"rms_norm_eps": 0.1}),
        gguf=Twin("glm4", NAMES | NORMS),
        quantized=("Q8_0",),
    ),
    Case(
        "glm4_plain",
        without(
            _glm("Glm4ForCausalLM", "glm4", attention_bias=False, head_dim=12, tie_word_embeddings=True),
            "partial_rotary_factor",
            "rope_theta",
            "rms_norm_eps",
        )
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.67}},
        matters=(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0}},
            {"rms_norm_eps": 1e-2},
        ),
    ),
    Case(
        "glm",
        _glm("GlmForCausalLM", "glm", intermediate_size=64, num_key_value_heads=1),
        matters=({"partial_rotary_factor": 1.0}, {"rope_theta": 10000.0}),
        gguf=Twin("chatglm", NAMES, stored=qkv_in_one, restored=qkv_apart),
        quantized=("Q8_0",),
    ),
    Case(
        "glm_defaults",
        without(_glm("GlmForCausalLM", "glm"), "attention_bias"),
        matters=({"partial_rotary_factor": 1.0},),
        gguf=Twin("chatglm", NAMES),
    ),
)
