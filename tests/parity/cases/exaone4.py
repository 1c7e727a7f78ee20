"""EXAONE 4."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without
from cases.olmo import NAMES, write_windows


def write_no_window(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    """Without a window the converter says nothing of one."""
    assert config["sliding_window"] is None


def _exaone4(**more: object) -> dict[str, object]:
    said: dict[str, object] = {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": "LLLG"}
    return base("Exaone4ForCausalLM", "exaone4", **said | {"rope_theta": 500.0, "attention_dropout": 0.0} | more)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}

CASES = (
    Case(
        "exaone4",
        _exaone4(
            intermediate_size=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        matters=({"sliding_window": 9}, {"rope_theta": 10000.0}, {"layer_types": ["full_attention"] * 4}),
        gguf=Twin("exaone4", NAMES, metadata=write_windows),
        quantized=("Q8_0",),
    ),
    Case(
        "exaone4_pattern",
        without(_exaone4(sliding_window_pattern=3, head_dim=12, tie_word_embeddings=True), "rope_theta")
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        matters=({"sliding_window_pattern": 4}, {"sliding_window": 9}),
    ),
    Case(
        "exaone4_whole",
        _exaone4(
            num_hidden_layers=2,
            hidden_size=64,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=["full_attention"] * 2,
            rope_scaling=LLAMA3,
            tie_word_embeddings=True,
        ),
        matters=({"rope_scaling": None}, {"sliding_window": 128}),
        gguf=Twin("exaone4", NAMES, metadata=write_no_window),
    ),
)
