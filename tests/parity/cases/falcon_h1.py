"""Falcon-H1."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base
from cases.mamba2 import INFINITY, mixer_names, restored_mixers, stored_mixers, write_ssm

NAMES = mixer_names("mamba") | {
    "pre_ff_layernorm.weight": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}


def _folded(name: str, config: Mapping[str, Any]) -> np.ndarray | float:
    """What llama.cpp's converter multiplies a tensor by."""
    attention, (gate, down) = config["attention_in_multiplier"], config["mlp_multipliers"]
    inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    if name.endswith("in_proj.weight"):
        sizes = (inner, inner, shared, shared, config["mamba_n_heads"])
        return config["ssm_in_multiplier"] * np.repeat(config["ssm_multipliers"], sizes)[:, None]
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": attention * config["key_multiplier"],
        "q_proj": attention,
        "v_proj": attention,
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    return float(factors.get(name.removesuffix(".weight").rpartition(".")[2], 1.0))


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    factors = {name: np.asarray(_folded(name, config), np.float32) for name in weights}
    return stored_mixers({name: weights[name] * factors[name] for name in weights}, config["mamba_n_groups"])


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made = restored_mixers(weights)
    return {name: made[name] / np.asarray(_folded(name, config), np.float32) for name in made}


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_ssm(
        writer,
        heads=config["mamba_n_heads"],
        head_dim=config["mamba_d_head"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        taps=config["mamba_d_conv"],
    )


FALCON = base(
    "FalconH1ForCausalLM",
    "falcon_h1",
    num_hidden_layers=2,
    intermediate_size=64,
    head_dim=16,
    attention_bias=False,
    mlp_bias=False,
    projectors_bias=False,
    num_logits_to_keep=1,
    rope_theta=300.0,
    rope_scaling=None,
    mamba_d_ssm=96,
    mamba_n_heads=12,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_d_state=10,
    mamba_d_conv=3,
    mamba_expand=2,
    mamba_chunk_size=16,
    mamba_conv_bias=True,
    mamba_proj_bias=False,
    mamba_rms_norm=True,
    mamba_norm_before_gate=False,
    mamba_use_mlp=True,
    time_step_limit=[0.0, INFINITY],
    embedding_multiplier=3.0,
    lm_head_multiplier=0.6,
    mlp_multipliers=[0.8, 0.7],
    key_multiplier=0.7,
    attention_in_multiplier=1.3,
    attention_out_multiplier=0.8,
    ssm_in_multiplier=1.2,
    ssm_out_multiplier=0.6,
    ssm_multipliers=[0.7, 1.4, 0.8, 1.3, 0.6],
)
FACTORS = (
    {"embedding_multiplier": 1.0},
    {"lm_head_multiplier": 1.0},
    {"mlp_multipliers": [1.0, 0.7]},
    {"mlp_multipliers": [0.8, 1.0]},
    {"key_multiplier": 1.0},
    {"attention_in_multiplier": 1.0},
    {"attention_out_multiplier": 1.0},
    {"ssm_in_multiplier": 1.0},
    {"ssm_out_multiplier": 1.0},
    *({"ssm_multipliers": [1.0 if n == part else 0.5 for n in range(5)]} for part in range(5)),
)

CASES = (
    Case(
        "falcon_h1",
        FALCON,
        matters=(*FACTORS, {"mamba_norm_before_gate": True}, {"rope_theta": 10000.0}),
        gguf=Twin(
            "falcon-h1",
            layer=NAMES,
            top={"model.final_layernorm": "output_norm"},
            metadata=_write,
            stored=_stored,
            restored=_restored,
        ),
        quantized=("Q8_0",),
    ),
    Case(
        "falcon_h1_norm_first",
        FALCON
        | {
            "mamba_norm_before_gate": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_conv_bias": False,
            "mamba_n_groups": 3,
            "tie_word_embeddings": True,
            "embedding_multiplier": 1.5,
        },
        matters=(*FACTORS[1:], {"mamba_norm_before_gate": False}),
    ),
    Case(
        "falcon_h1_plain",
        FALCON | {"mamba_rms_norm": False, "mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_d_head": "auto"},
        matters=FACTORS,
    ),
)
