"""Bamba, which llama.cpp writes as Granite's hybrid."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf_twin import Arrays, Twin

from cases.base import Case, base
from cases.granitemoehybrid import write_mamba
from cases.mamba2 import INFINITY, mixer_names, restored_mixers, stored_mixers

NAMES = mixer_names("mamba") | {
    "pre_ff_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    write_mamba(writer, config)
    layers, kv_heads = range(config["num_hidden_layers"]), config["num_key_value_heads"]
    writer.add_head_count_kv([kv_heads if layer in config["attn_layer_indices"] else 0 for layer in layers])
    writer.add_rope_dimension_count(config["attn_rotary_emb"])
    writer.add_rope_scaling_finetuned(True)


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return stored_mixers(weights, config["mamba_n_groups"])


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return restored_mixers(weights)


CASES = (
    Case(
        "bamba",
        base(
            "BambaForCausalLM",
            "bamba",
            attn_layer_indices=[1],
            attn_rotary_emb=4,
            attention_bias=False,
            mlp_bias=False,
            rope_theta=200.0,
            mamba_n_heads=8,
            mamba_n_groups=2,
            mamba_d_state=10,
            mamba_d_head="auto",
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=16,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
            num_logits_to_keep=1,
            time_step_limit=[0.0, INFINITY],
        ),
        matters=({"rope_theta": 10000.0}, {"rms_norm_eps": 1e-2}),
        gguf=Twin(
            "granitehybrid",
            layer=NAMES,
            interleaved=("q_proj", "k_proj"),
            top={"model.final_layernorm": "output_norm"},
            metadata=_write,
            stored=_stored,
            restored=_restored,
        ),
    ),
)
