"""Command R and its successors."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without


def write_logit_scale(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    writer.add_logit_scale(config["logit_scale"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])


def _cohere(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    config = base(
        architecture, model_type, num_hidden_layers=4, layer_norm_eps=1e-3, logit_scale=1.75, rope_theta=500.0
    )
    return without(config, "rms_norm_eps") | {"tie_word_embeddings": True} | more


def _cohere2(**more: object) -> dict[str, object]:
    return _cohere("Cohere2ForCausalLM", "cohere2", sliding_window=8, **more)


LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

CASES = (
    Case(
        "cohere2",
        _cohere2(
            intermediate_size=64,
            rotary_pct=1.0,
            use_parallel_block=True,
            use_gated_activation=True,
            use_qk_norm=False,
            position_embedding_type="rope_gptj",
            sliding_window_pattern=4,
        ),
        matters=(
            {"logit_scale": 1.0},
            {"sliding_window": 9},
            {"sliding_window_pattern": 3},
            {"layer_norm_eps": 0.1},
            {"rope_theta": 10000.0},
        ),
        gguf=Twin("cohere2", metadata=write_logit_scale),
        quantized=("Q8_0",),
    ),
    Case(
        "cohere2_layer_types",
        _cohere2(layer_types=LAYERS, attention_bias=True, tie_word_embeddings=False),
        matters=({"layer_types": LAYERS[::-1]}, {"layer_types": ["sliding_attention"] * 4}),
    ),
    Case(
        "cohere",
        _cohere("CohereForCausalLM", "cohere", use_qk_norm=False, model_max_length=128),
        matters=({"logit_scale": 1.0}, {"rope_theta": 10000.0}),
        gguf=Twin("command-r", metadata=write_logit_scale),
    ),
)
