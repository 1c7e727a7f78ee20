"""How llama.cpp's converter writes decoders with latent attention. Source: `convert_hf_to_gguf.py`, DeepseekV2Model."""

from collections.abc import Callable

from models.arch.experts import GGUF_NAMES
from models.arch.gguf import Config, GGUFLayout, decoder_config, layout
from models.config_reader import JSON
from models.gguf_metadata import GGUFMetadata


def latent_config(metadata: GGUFMetadata) -> Config:
    """The metadata in a config.json's words. Raises CheckpointError."""
    config = decoder_config(metadata)
    rope_dim, rank = metadata.count("rope.dimension_count"), metadata.count("attention.kv_lora_rank")
    # In newer files a head is as attention sees it once it is absorbed, and these are the model's own.
    key_dim = metadata.integer("attention.key_length_mla") or metadata.count("attention.key_length")
    value_dim = metadata.integer("attention.value_length_mla") or metadata.count("attention.value_length")
    config.pop("partial_rotary_factor", None)
    config["rope_scaling"] = _scaling(metadata, config["rope_scaling"])
    query_rank = metadata.integer("attention.q_lora_rank")
    return config | {
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "kv_lora_rank": rank,
        "q_lora_rank": query_rank or None,
        "gguf_divided": "blk.0.attn_k_b.weight" in metadata.shapes,
        "first_k_dense_replace": metadata.integer("leading_dense_block_count") or 0,
        "n_routed_experts": metadata.count("expert_count"),
        "n_shared_experts": metadata.integer("expert_shared_count") or 0,
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "routed_scaling_factor": metadata.real("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(metadata.flag("expert_weights_norm")),
        "n_group": metadata.integer("expert_group_count") or 1,
        "topk_group": metadata.integer("expert_group_used_count") or 1,
        "topk_method": _method(metadata),
        "num_nextn_predict_layers": metadata.integer("nextn_predict_layers") or 0,
    }


def _method(metadata: GGUFMetadata) -> str:
    if metadata.integer("expert_gating_func") == 2:
        return "noaux_tc"
    return "group_limited_greedy" if (metadata.integer("expert_group_count") or 1) > 1 else "greedy"


def _scaling(metadata: GGUFMetadata, scaling: JSON) -> JSON:
    """YaRN's temperature: the file has a tenth of what the config calls mscale_all_dim."""
    multiplier = metadata.real("rope.scaling.yarn_log_multiplier")
    if not isinstance(scaling, dict) or not multiplier:
        return scaling
    mscale = multiplier * 10
    return {**scaling, "mscale": mscale, "mscale_all_dim": mscale}


def latent_layout(arch: str, *, hf: str, model_type: str, applies: Callable[[GGUFMetadata], bool]) -> GGUFLayout:
    """The layout of such a decoder with experts."""
    return layout(
        arch,
        hf=hf,
        model_type=model_type,
        bare=("exp_probs_b",),
        config=latent_config,
        applies=applies,
        names=GGUF_NAMES,
        attn_q_a="self_attn.q_a_proj",
        attn_q_a_norm="self_attn.q_a_layernorm",
        attn_q_b="self_attn.q_b_proj",
        attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
        attn_kv_a_norm="self_attn.kv_a_layernorm",
        attn_kv_b="self_attn.kv_b_proj",
        attn_k_b="self_attn.kv_b_proj.keys",
        attn_v_b="self_attn.kv_b_proj.values",
        exp_probs_b="mlp.gate.e_score_correction_bias",
        ffn_gate_shexp="mlp.shared_experts.gate_proj",
        ffn_up_shexp="mlp.shared_experts.up_proj",
        ffn_down_shexp="mlp.shared_experts.down_proj",
    )
