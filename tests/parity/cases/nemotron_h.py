"""Nemotron-H, dense and with experts."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.mamba2 import INFINITY, mixer_names, restored_mixers, stored_mixers, write_ssm
from cases.moe import stacked, unstacked

NAMES = mixer_names("mixer") | {
    "norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.gate": "ffn_gate_inp",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps",
    "mixer.experts.down_proj": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
}
TOP = {"model.embeddings": "token_embd", "model.norm_f": "output_norm"}
KINDS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def _one_by_one(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Each expert's matrices by themselves, as published."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, part = name.rpartition(".")
        if stem.endswith(".experts"):
            made |= {f"{stem}.{n}.{part}.weight": np.ascontiguousarray(each) for n, each in enumerate(weight)}
        else:
            made[name] = weight
    return made


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return stacked(stored_mixers(weights, config["n_groups"]), config)


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return unstacked(restored_mixers(weights), config)


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    pattern = config.get("hybrid_override_pattern") or "".join(KINDS[kind] for kind in config["layers_block_type"])
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(pattern))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([config["num_key_value_heads"] if kind == "*" else 0 for kind in pattern])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_rope_scaling_finetuned(False)
    write_ssm(
        writer,
        heads=config["mamba_num_heads"],
        head_dim=config["mamba_head_dim"],
        groups=config["n_groups"],
        state=config["ssm_state_size"],
        taps=config["conv_kernel"],
    )
    if "E" not in pattern:
        writer.add_feed_forward_length([config["intermediate_size"] if kind == "-" else 0 for kind in pattern])
        return
    writer.add_feed_forward_length([config["moe_intermediate_size"] if kind == "E" else 0 for kind in pattern])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config.get("moe_latent_size"):
        writer.add_moe_latent_size(config["moe_latent_size"])


NEMOTRON_H = without(
    base(
        "NemotronHForCausalLM",
        "nemotron_h",
        attention_bias=False,
        head_dim=16,
        intermediate_size=64,
        hybrid_override_pattern="M-*M",
        num_hidden_layers=4,
        layer_norm_epsilon=1e-4,
        mlp_bias=False,
        mlp_hidden_act="relu2",
        mamba_num_heads=12,
        mamba_head_dim=8,
        n_groups=3,
        ssm_state_size=10,
        conv_kernel=3,
        expand=2,
        chunk_size=16,
        # What transformers takes for a limit, and nobody else does.
        time_step_min=1e-30,
        time_step_limit=[0.0, INFINITY],
        use_bias=False,
        use_conv_bias=True,
        mamba_proj_bias=False,
        mamba_hidden_act="silu",
        residual_in_fp32=False,
        rescale_prenorm_residual=True,
    ),
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
)
MOE = NEMOTRON_H | {
    "hybrid_override_pattern": "ME*E",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
}
AS_PUBLISHED = (("model.", "backbone."),)


def _twin(architecture: str) -> Twin:
    return Twin(
        architecture,
        layer=NAMES,
        interleaved=("q_proj", "k_proj"),
        top=TOP,
        own_dims=True,
        metadata=_write,
        stored=_stored,
        restored=_restored,
    )


CASES = (
    Case(
        "nemotron_h",
        NEMOTRON_H,
        matters=({"layer_norm_epsilon": 1e-2}, {"mlp_hidden_act": "silu"}),
        renamed=AS_PUBLISHED,
        gguf=_twin("nemotron_h"),
        quantized=("Q8_0",),
    ),
    Case(
        "nemotron_h_moe",
        MOE,
        matters=({"num_experts_per_tok": 2}, {"topk_group": 4}, {"routed_scaling_factor": 1.0}),
        renamed=AS_PUBLISHED,
        published=_one_by_one,
        gguf=_twin("nemotron_h_moe"),
    ),
    Case(
        "nemotron_h_latent",
        without(MOE, "hybrid_override_pattern", "num_hidden_layers")
        | {
            "layers_block_type": ["moe", "mamba", "mlp", "attention"],
            "num_hidden_layers": 4,
            "moe_latent_size": 20,
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
            "mamba_proj_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
        matters=({"norm_topk_prob": True},),
        renamed=AS_PUBLISHED,
        published=_one_by_one,
        gguf=_twin("nemotron_h_moe"),
    ),
)
