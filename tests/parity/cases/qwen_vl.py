"""The text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as multimodal checkpoints have them."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without
from cases.moe import EXPERT_NAMES, one_by_one, stacked, write_experts

INNER, OUTER, TOWER = "model.language_model.", "model.", "model.visual."
TOKENS = {"vision_start_token_id": 290, "vision_end_token_id": 291, "image_token_id": 292, "video_token_id": 293}
OLDER = ((INNER, OUTER), (TOWER, "visual."))
"""Names as the first ones were published."""


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_sections([*(config.get("rope_scaling") or config)["mrope_section"], 0])
    if (levels := config["vision_config"].get("deepstack_visual_indexes")) is not None:
        writer.add_num_deepstack_layers(len(levels))
    if "num_experts" in config:
        write_experts(writer, config)


def _transposed(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """Experts as (inputs, outputs), or back."""
    return {
        name: np.ascontiguousarray(weight.swapaxes(1, 2)) if ".experts." in name else weight
        for name, weight in weights.items()
    }


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    """The text model alone."""
    named = {name.replace(INNER, OUTER): weight for name, weight in weights.items() if not name.startswith(TOWER)}
    return stacked(one_by_one(_transposed(named, config), config), config)


def _restored(stored: Arrays, config: Mapping[str, Any]) -> Arrays:
    return {name.replace(OUTER, INNER): weight for name, weight in stored.items()}


def _twin(arch: str, names: Mapping[str, str]) -> Twin:
    return Twin(arch, layer=names, metadata=_metadata, stored=_stored, restored=_restored)


QWEN2 = {
    **without(base("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"), "pad_token_id"),
    **TOKENS,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 32,
    },
}
FIRST = {
    **QWEN2,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
}
_TEXT = without(
    base(
        "",
        "qwen3_vl_text",
        attention_bias=False,
        head_dim=16,
        num_hidden_layers=3,
        rms_norm_eps=1e-5,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    ),
    "architectures",
    "torch_dtype",
)


def _whole(architecture: str, model_type: str, **text: object) -> dict[str, Any]:
    text = {**_TEXT, "model_type": f"{model_type}_text", **text}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **TOKENS,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vision_config": {
            "deepstack_visual_indexes": [0],
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "model_type": model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 32,
            "patch_size": 4,
        },
    }


QWEN3 = _whole("Qwen3VLForConditionalGeneration", "qwen3_vl", intermediate_size=64)
EXPERTS = _whole(
    "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl_moe",
    mlp_only_layers=[],
    decoder_sparse_step=1,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    num_experts=5,
    num_experts_per_tok=2,
)


def _but(config: Mapping[str, Any], **more: object) -> dict[str, object]:
    """A change of the text model's configuration."""
    return {"text_config": {**config["text_config"], **more}}


CASES = (
    Case(
        "qwen2_5_vl",
        QWEN2,
        renamed=OLDER,
        matters=({"rope_theta": 1_000_000.0}, {"rms_norm_eps": 0.1}),
        gguf=_twin("qwen2vl", {}),
        quantized=("Q8_0",),
    ),
    Case("qwen2_vl", FIRST, renamed=OLDER, matters=({"sliding_window": 9}, {"max_window_layers": 0})),
    Case(
        "qwen3_vl",
        QWEN3,
        matters=(_but(QWEN3, rope_theta=1_000_000.0),),
        gguf=_twin("qwen3vl", {}),
        quantized=("Q8_0",),
    ),
    Case(
        "qwen3_vl_moe",
        EXPERTS,
        published=_transposed,
        matters=(_but(EXPERTS, num_experts_per_tok=3),),
        gguf=_twin("qwen3vlmoe", EXPERT_NAMES),
    ),
)
