"""OLMo 2 and OLMo 3."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without

NAMES = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}


def write_windows(writer: gguf.GGUFWriter, config: Mapping[str, list[str]]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _olmo2(**more: object) -> dict[str, object]:
    return base("Olmo2ForCausalLM", "olmo2", attention_bias=False, num_hidden_layers=2) | more


def _olmo3(**more: object) -> dict[str, object]:
    return base("Olmo3ForCausalLM", "olmo3", sliding_window=8, rope_theta=500_000.0) | more


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BY_KIND = {
    "full_attention": {**YARN, "rope_theta": 500.0, "attention_factor": 1.2, "beta_fast": 2.0, "beta_slow": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

CASES = (
    Case(
        "olmo2",
        _olmo2(intermediate_size=64, rope_theta=500.0),
        matters=({"rope_theta": 10000.0}, {"rms_norm_eps": 0.1}),
        gguf=Twin("olmo2", NAMES),
        quantized=("Q8_0",),
    ),
    Case(
        "olmo2_yarn",
        without(
            _olmo2(tie_word_embeddings=True, hidden_act="gelu", rope_scaling=YARN, rope_theta=100.0),
            "num_key_value_heads",
        ),
        matters=({"rope_scaling": None}, {"hidden_act": "silu"}),
    ),
    Case(
        "olmo3",
        _olmo3(
            num_hidden_layers=4,
            rope_scaling=YARN,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        matters=({"rope_scaling": None}, {"sliding_window": 9}, {"layer_types": None}),
        gguf=Twin("olmo2", NAMES, metadata=write_windows),
    ),
    Case(
        "olmo3_by_kind",
        without(_olmo3(num_hidden_layers=4, rope_parameters=BY_KIND), "rope_theta"),
        matters=(
            {"rope_parameters": BY_KIND | {"sliding_attention": BY_KIND["full_attention"]}},
            {"rope_parameters": BY_KIND | {"full_attention": BY_KIND["sliding_attention"]}},
            {"layer_types": ["full_attention"] * 4},
        ),
    ),
)
