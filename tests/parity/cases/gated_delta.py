"""Qwen3-Next and Qwen3.5, dense and with experts."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.moe import EXPERT_NAMES, one_by_one, stacked, unstacked, write_experts

NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
SHARED_NAMES = EXPERT_NAMES | {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
MTP_NAMES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}
PLAIN = ("linear_attn.norm.weight",)


def _reordered(weight: np.ndarray, axis: int, first: int, outer: int, inner: int, head: int) -> np.ndarray:
    """Behind `first`, heads of that size along an axis, (outer, inner) of them, in the order (inner, outer)."""
    size = weight.shape[axis] - first
    order = np.arange(size).reshape(outer, inner, head).swapaxes(0, 1).ravel() + first
    return np.take(weight, np.concatenate((np.arange(first), order)), axis)


def _heads(weights: Arrays, config: Mapping[str, Any], *, back: bool) -> Arrays:
    """Heads of values in turns by their heads of keys, as Qwen3.5's files have them; or back."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    first, head = 2 * keys * config["linear_key_head_dim"], config["linear_value_head_dim"]
    shape = (heads // keys, keys) if back else (keys, heads // keys)
    # The axis, what lies before the heads, and how large one is.
    places = {
        "in_proj_qkv.weight": (0, first, head),
        "conv1d.weight": (0, first, head),
        "in_proj_z.weight": (0, 0, head),
        "in_proj_b.weight": (0, 0, 1),
        "in_proj_a.weight": (0, 0, 1),
        "A_log": (0, 0, 1),
        "dt_bias": (0, 0, 1),
        "out_proj.weight": (1, 0, head),
    }
    made: Arrays = {}
    for name, weight in weights.items():
        place = places.get(name.partition(".linear_attn.")[2])
        made[name] = weight if place is None else _reordered(weight, place[0], place[1], *shape, place[2])
    return made


def _apart(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Queries, keys and values in one matrix, the gate in another."""
    keys, key_dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    ends = np.cumsum([key_dim, key_dim, values])
    made: Arrays = {}
    for name, weight in weights.items():
        stem, marker, _ = name.partition("in_proj_qkvz")
        if not marker:
            made[name] = weight
            continue
        parts = np.split(weight.reshape(keys, -1, weight.shape[1]), ends, axis=1)
        *qkv, z = (np.ascontiguousarray(part.reshape(-1, weight.shape[1])) for part in parts)
        made |= {f"{stem}in_proj_qkv.weight": np.concatenate(qkv), f"{stem}in_proj_z.weight": z}
    return made


def _numbers(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Kernels without the axis in the middle, rates as they count, norms as they count."""
    made: Arrays = {}
    for name, weight in weights.items():
        value = weight
        if name.endswith("conv1d.weight"):
            value = weight[:, 0]
        elif name.endswith("A_log"):
            value = -np.exp(weight)
        elif name.endswith("norm.weight") and not name.endswith(PLAIN):
            value = weight + np.float32(1)
        made[name] = value
    return made


def _numbers_back(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        value = weight
        if name.endswith("conv1d.weight"):
            value = weight[:, None]
        elif name.endswith("A_log"):
            value = np.log(-weight)
        elif name.endswith("norm.weight") and not name.endswith(PLAIN):
            value = weight - np.float32(1)
        made[name] = value
    return made


def _mtp_as_a_layer(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """What predicts further tokens as one more layer."""
    layer = config["num_hidden_layers"]
    made: Arrays = {}
    for name, weight in weights.items():
        rest = name.removeprefix("mtp.")
        if rest == name:
            made[name] = weight
        elif rest.startswith("layers.0."):
            made[f"model.layers.{layer}.{rest.removeprefix('layers.0.')}"] = weight
        else:
            stem = rest.removesuffix(".weight")
            made[f"blk.{layer}.nextn.{MTP_NAMES[stem]}.weight"] = weight
    return made


def _experts_apart(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return stacked(one_by_one(weights, config), config)


def _next_stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return _numbers(_apart(stacked(weights, config), config), config)


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    named = _mtp_as_a_layer(weights, config)
    return _numbers(_heads(_experts_apart(named, config), config, back=False), config)


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    own = {name: w for name, w in weights.items() if f".{config['num_hidden_layers']}." not in name}
    return _numbers_back(_heads(unstacked(own, config), config, back=True), config)


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * heads)
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    if "num_experts" in config:
        write_experts(writer, config)
    if further := config.get("mtp_num_hidden_layers"):
        writer.add_nextn_predict_layers(further)
        writer.add_block_count(config["num_hidden_layers"] + further)


def with_mtp(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """A layer that predicts further tokens beside: attention and an MLP, as published checkpoints have it."""
    config = config.get("text_config", config)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    shapes = {
        "fc": (hidden, 2 * hidden),
        **dict.fromkeys(("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"), (hidden,)),
        **dict.fromkeys(("layers.0.input_layernorm", "layers.0.post_attention_layernorm"), (hidden,)),
        "layers.0.self_attn.q_proj": (2 * queries, hidden),
        "layers.0.self_attn.k_proj": (keys, hidden),
        "layers.0.self_attn.v_proj": (keys, hidden),
        "layers.0.self_attn.o_proj": (hidden, queries),
        **dict.fromkeys(("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm"), (head_dim,)),
    }
    made: Arrays = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        made[f"mtp.{name}.weight"] = rng.normal(0.0, 0.3, shape).astype(np.float32)
    return weights | made


_SIZES = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    # Where a head says next to nothing, its norm makes much of the last bits.
    "rms_norm_eps": 1e-3,
    "linear_conv_kernel_dim": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
}
_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
_MROPE = {
    "mrope_interleaved": True,
    "mrope_section": [2, 1, 1],
    "partial_rotary_factor": 0.5,
    "rope_theta": 5000.0,
    "rope_type": "default",
}
NEXT = base(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    **_SIZES,
    **_EXPERTS,
    full_attention_interval=3,
    partial_rotary_factor=0.5,
    rope_theta=5000.0,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    attention_bias=False,
)
DENSE = without(
    base(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        **_SIZES | {"linear_value_head_dim": 16},
        attention_bias=False,
        attn_output_gate=True,
        full_attention_interval=4,
        intermediate_size=64,
        # A quarter of the layers in another place than the interval says.
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        mamba_ssm_dtype="float32",
        mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False,
        rope_parameters=_MROPE,
    ),
    "rope_theta",
)
MOE = without(
    base(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        **_SIZES | {"num_hidden_layers": 3},
        **_EXPERTS,
        attn_output_gate=True,
        full_attention_interval=2,
        rope_parameters=_MROPE,
    ),
    "rope_theta",
    "intermediate_size",
)
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 32,
}


def _whole(config: Mapping[str, object], architecture: str, model_type: str, **more: object) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_token_id": 290,
        "video_token_id": 291,
        "vision_start_token_id": 292,
        "vision_end_token_id": 293,
        "torch_dtype": "float32",
        "text_config": without(config, "architectures", "torch_dtype", "tie_word_embeddings"),
        "vision_config": VISION | {"model_type": model_type},
        **more,
    }


def _twin(arch: str, names: Mapping[str, str], stored: Callable[[Arrays, Mapping[str, Any]], Arrays]) -> Twin:
    return Twin(arch, layer=NAMES | names, metadata=_write, stored=stored, restored=_restored)


CASES = (
    Case(
        "qwen3_next",
        NEXT,
        norms_add=1.0,
        plain_norms=PLAIN,
        published=one_by_one,
        matters=(
            {"num_experts_per_tok": 3},
            {"norm_topk_prob": False},
            {"partial_rotary_factor": 1.0},
            {"rope_theta": 1000000.0},
        ),
        gguf=_twin("qwen3next", SHARED_NAMES, _next_stored),
    ),
    Case(
        "qwen3_next_mixed",
        without(NEXT, "full_attention_interval")
        | {
            "architectures": ["Qwen3NextMoeForCausalLM"],
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "attention_bias": True,
            "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "tie_word_embeddings": True,
        },
        norms_add=1.0,
        plain_norms=PLAIN,
        published=one_by_one,
        matters=({"norm_topk_prob": True}, {"partial_rotary_factor": 1.0}),
    ),
    Case(
        "qwen3_5",
        DENSE,
        norms_add=1.0,
        plain_norms=PLAIN,
        published=with_mtp,
        matters=(
            {"rope_parameters": _MROPE | {"partial_rotary_factor": 0.25}},
            {"rope_parameters": _MROPE | {"rope_theta": 1000000.0}},
            {"rms_norm_eps": 1e-6},
        ),
        gguf=_twin("qwen35", {}, _stored),
        quantized=("Q8_0",),
    ),
    Case(
        "qwen3_5_vision",
        _whole(DENSE, "Qwen3_5ForConditionalGeneration", "qwen3_5", tie_word_embeddings=True),
        norms_add=1.0,
        plain_norms=PLAIN,
        published=with_mtp,
    ),
    Case(
        "qwen3_5_moe",
        MOE,
        norms_add=1.0,
        plain_norms=PLAIN,
        matters=({"num_experts_per_tok": 3}, {"rope_parameters": _MROPE | {"partial_rotary_factor": 0.25}}),
        gguf=_twin("qwen35moe", SHARED_NAMES, _stored),
    ),
    Case(
        "qwen3_5_moe_vision",
        _whole(MOE, "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", tie_word_embeddings=False),
        norms_add=1.0,
        plain_norms=PLAIN,
    ),
)
