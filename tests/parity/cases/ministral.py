"""Ministral, Ministral 3 and Mistral 3."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without


def write_query_scale(writer: gguf.GGUFWriter, config: Mapping[str, Mapping[str, float]]) -> None:
    writer.add_rope_scaling_yarn_log_mul(config["rope_parameters"]["mscale_all_dim"])
    writer.add_attn_temperature_scale(config["rope_parameters"]["llama_4_scaling_beta"])


YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 2.0,
    "llama_4_scaling_beta": 0.5,
}


def _ministral3(**more: object) -> dict[str, object]:
    config = base("Ministral3ForCausalLM", "ministral3", num_hidden_layers=2, head_dim=16, sliding_window=None)
    return without(config, "rope_theta") | {"rope_parameters": YARN} | more


CASES = (
    Case(
        "ministral",
        base(
            "MinistralForCausalLM",
            "ministral",
            head_dim=12,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        matters=({"sliding_window": 9}, {"layer_types": ["sliding_attention"] * 3}),
    ),
    Case(
        "ministral3",
        _ministral3(intermediate_size=64),
        matters=(
            {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.0}},
            {"rope_parameters": YARN | {"original_max_position_embeddings": 32}},
            {"rope_parameters": YARN | {"mscale_all_dim": 1.0}},
            {"rope_parameters": YARN | {"factor": 4.0}},
        ),
        gguf=Twin("mistral3", interleaved=("q_proj", "k_proj"), metadata=write_query_scale),
        quantized=("Q8_0",),
    ),
    Case(
        "mistral3_vision",
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "image_token_index": 292,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "text_config": without(
                _ministral3(sliding_window=8), "architectures", "tie_word_embeddings", "torch_dtype"
            ),
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 16,
                "patch_size": 4,
            },
        },
    ),
)
