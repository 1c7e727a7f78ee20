"""Granite 4."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base
from cases.granite import write_factors
from cases.mamba2 import INFINITY, mixer_names, restored_mixers, stored_mixers, write_ssm

NAMES = mixer_names("mamba") | {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_exps",
    "block_sparse_moe.up": "ffn_up_exps",
    "block_sparse_moe.output_linear": "ffn_down_exps",
}
BESIDE_EXPERTS = {
    "shared_mlp.gate": "ffn_gate_shexp",
    "shared_mlp.up": "ffn_up_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
ALONE = {"shared_mlp.gate": "ffn_gate", "shared_mlp.up": "ffn_up", "shared_mlp.output_linear": "ffn_down"}
PUBLISHED = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


def _as_published(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        renamed = name
        for ours, theirs in PUBLISHED.items():
            renamed = renamed.replace(ours, theirs)
        made[renamed] = weight
    return made


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in stored_mixers(weights, config["mamba_n_groups"]).items():
        stem = name.removesuffix(".input_linear.weight")
        if stem == name:
            made[name] = weight
            continue
        gate, up = np.split(weight, 2, axis=-2)
        made |= {f"{stem}.gate.weight": gate, f"{stem}.up.weight": up}
    return made


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made = restored_mixers(weights)
    for name in [name for name in made if name.endswith(".gate.weight")]:
        stem = name.removesuffix(".gate.weight")
        made[f"{stem}.input_linear.weight"] = np.concatenate([made.pop(name), made.pop(f"{stem}.up.weight")], axis=-2)
    return made


def write_mamba(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_ssm(
        writer,
        heads=config["mamba_n_heads"],
        head_dim=config["mamba_expand"] * config["hidden_size"] // config["mamba_n_heads"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        taps=config["mamba_d_conv"],
    )


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_factors(writer, config)
    write_mamba(writer, config)
    kv_heads = config["num_key_value_heads"]
    writer.add_head_count_kv([kv_heads if kind == "attention" else 0 for kind in config["layer_types"]])
    writer.add_rope_scaling_finetuned(False)
    writer.add_context_length(1 << 20)
    if config["num_local_experts"]:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    else:
        writer.add_feed_forward_length(config["shared_intermediate_size"])


HYBRID = base(
    "GraniteMoeHybridForCausalLM",
    "granitemoehybrid",
    attention_bias=False,
    attention_multiplier=0.25,
    embedding_multiplier=5.0,
    residual_multiplier=0.6,
    logits_scaling=1.5,
    layer_types=["mamba", "attention", "mamba"],
    position_embedding_type="nope",
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_state=8,
    mamba_d_head="auto",
    mamba_d_conv=3,
    mamba_expand=2,
    mamba_chunk_size=16,
    mamba_conv_bias=True,
    mamba_proj_bias=False,
    intermediate_size=16,
    shared_intermediate_size=32,
    num_local_experts=5,
    num_experts_per_tok=3,
    rope_theta=500.0,
    time_step_limit=[0.0, INFINITY],
)
MATTERS = (
    {"attention_multiplier": 0.5},
    {"embedding_multiplier": 1.0},
    {"residual_multiplier": 1.0},
    {"logits_scaling": 1.0},
    {"position_embedding_type": "rope"},
)

CASES = (
    Case(
        "granitemoehybrid",
        HYBRID,
        matters=(*MATTERS, {"num_experts_per_tok": 2}),
        published=_as_published,
        gguf=Twin(
            "granitehybrid",
            layer=NAMES | BESIDE_EXPERTS,
            interleaved=("q_proj", "k_proj"),
            metadata=_write,
            stored=_stored,
            restored=_restored,
        ),
    ),
    Case(
        "granitemoehybrid_dense",
        HYBRID
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True, "embedding_multiplier": 2.0},
        matters=MATTERS,
        gguf=Twin(
            "granitehybrid",
            layer=NAMES | ALONE,
            interleaved=("q_proj", "k_proj"),
            metadata=_write,
            stored=_stored,
            restored=_restored,
        ),
        quantized=("Q8_0",),
    ),
    Case(
        "granitemoehybrid_rope",
        HYBRID
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_n_groups": 1,
            "mamba_n_heads": 6,
            "mamba_expand": 3,
            "mamba_d_head": 16,
            "layer_types": ["attention", "mamba", "attention"],
        },
        matters=({"position_embedding_type": None}, {"rope_theta": 10000.0}),
    ),
)
