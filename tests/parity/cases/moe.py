"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

GATES = ("gate_proj", "up_proj", "down_proj")
EXPERT_NAMES = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def one_by_one(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Each expert's matrices by themselves, as published."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj" and weight.ndim == 3:
            half = weight.shape[1] // 2
            for n, each in enumerate(weight):
                made[f"{stem}.{n}.gate_proj.weight"] = np.ascontiguousarray(each[:half])
                made[f"{stem}.{n}.up_proj.weight"] = np.ascontiguousarray(each[half:])
        elif last == "down_proj" and weight.ndim == 3:
            made |= {f"{stem}.{n}.down_proj.weight": each for n, each in enumerate(weight)}
        else:
            made[name] = weight
    return made


def as_mixtrals(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp.": "block_sparse_moe."}
    made: Arrays = {}
    for name, weight in one_by_one(weights, config).items():
        renamed = name
        for ours, theirs in names.items():
            renamed = renamed.replace(ours, theirs)
        made[renamed] = weight
    return made


def unstacked(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        before, marker, after = name.partition(".experts.")
        if marker:
            made |= {f"{before}.experts.{n}.{after}": np.ascontiguousarray(each) for n, each in enumerate(weight)}
        else:
            made[name] = weight
    return made


def stacked(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Experts in one tensor a projection, as llama.cpp's converter stacks them."""
    found: dict[str, dict[int, np.ndarray]] = {}
    rest: Arrays = {}
    for name, weight in weights.items():
        before, marker, after = name.partition(".experts.")
        if not marker:
            rest[name] = weight
            continue
        number, _, inner = after.partition(".")
        found.setdefault(f"{before}.experts.{inner}", {})[int(number)] = weight
    return rest | {name: np.stack([each[n] for n in range(len(each))]) for name, each in found.items()}


def write_experts(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _gpt_oss_stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Gate and up apart, matrices (outputs, inputs)."""
    made: Arrays = {}
    for name, weight in weights.items():
        stem = name.rpartition(".")[0]
        match name.rpartition(".")[2]:
            case "gate_up_proj":
                turned = weight.swapaxes(1, 2)
                made |= {f"{stem}.gate_proj.weight": turned[:, 0::2], f"{stem}.up_proj.weight": turned[:, 1::2]}
            case "gate_up_proj_bias":
                made |= {f"{stem}.gate_proj.bias": weight[:, 0::2], f"{stem}.up_proj.bias": weight[:, 1::2]}
            case "down_proj":
                made[f"{stem}.down_proj.weight"] = weight.swapaxes(1, 2)
            case "down_proj_bias":
                made[f"{stem}.down_proj.bias"] = weight
            case "sinks":
                made[f"{name}.weight"] = weight
            case _:
                made[name] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in made.items()}


def _write_gpt_oss(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_yarn_beta_fast(config["rope_scaling"]["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(config["rope_scaling"]["beta_slow"])


MIXTRAL = base(
    "MixtralForCausalLM",
    "mixtral",
    num_hidden_layers=2,
    num_local_experts=6,
    num_experts_per_tok=3,
    router_jitter_noise=0.0,
    sliding_window=None,
    intermediate_size=64,
)
QWEN3 = base(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    head_dim=16,
    num_hidden_layers=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
)
QWEN2 = base(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    num_hidden_layers=2,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    norm_topk_prob=False,
)
GPT_OSS = without(
    base(
        "GptOssForCausalLM",
        "gpt_oss",
        head_dim=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
        swiglu_limit=0.5,
        swiglu_alpha=1.3,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 1.0,
            "beta_slow": 0.25,
            "truncate": False,
            "original_max_position_embeddings": 24,
        },
    ),
    "hidden_act",
)

CASES = (
    Case(
        "mixtral",
        MIXTRAL,
        published=as_mixtrals,
        matters=({"num_experts_per_tok": 2},),
        gguf=Twin(
            "llama",
            interleaved=("q_proj", "k_proj"),
            layer={
                "block_sparse_moe.gate": "ffn_gate_inp",
                "block_sparse_moe.experts.w1": "ffn_gate_exps",
                "block_sparse_moe.experts.w3": "ffn_up_exps",
                "block_sparse_moe.experts.w2": "ffn_down_exps",
            },
            metadata=write_experts,
            stored=stacked,
            restored=unstacked,
        ),
    ),
    Case(
        "qwen3_moe",
        QWEN3,
        published=one_by_one,
        matters=({"num_experts_per_tok": 3}, {"norm_topk_prob": False}),
        gguf=Twin("qwen3moe", layer=EXPERT_NAMES, metadata=write_experts, stored=stacked, restored=unstacked),
        quantized=("Q8_0", "Q4_1"),
    ),
    Case(
        "qwen3_moe_mixed",
        QWEN3 | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
        published=one_by_one,
    ),
    Case(
        "qwen2_moe",
        QWEN2,
        published=one_by_one,
        matters=({"num_experts_per_tok": 3}, {"norm_topk_prob": True}),
        gguf=Twin(
            "qwen2moe",
            layer=EXPERT_NAMES
            | {
                "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
                "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
                "mlp.shared_expert.up_proj": "ffn_up_shexp",
                "mlp.shared_expert.down_proj": "ffn_down_shexp",
            },
            metadata=write_experts,
            stored=stacked,
            restored=unstacked,
        ),
    ),
    Case(
        "gpt_oss",
        GPT_OSS,
        matters=(
            {"num_experts_per_tok": 2},
            {"swiglu_limit": 7.0},
            {"swiglu_alpha": 1.702},
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"sliding_window": 9},
        ),
    ),
    Case(
        # llama.cpp knows one limit and one alpha.
        "gpt_oss_plain",
        GPT_OSS | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        gguf=Twin(
            "gpt-oss",
            layer={
                "mlp.router": "ffn_gate_inp",
                "mlp.experts.gate_proj": "ffn_gate_exps",
                "mlp.experts.up_proj": "ffn_up_exps",
                "mlp.experts.down_proj": "ffn_down_exps",
                "post_attention_layernorm": "post_attention_norm",
                "self_attn.sinks": "attn_sinks",
            },
            metadata=_write_gpt_oss,
            stored=_gpt_oss_stored,
        ),
    ),
)
