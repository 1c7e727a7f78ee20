from typing import Any

import pytest

from models.llm.qwen3 import ARCHITECTURE

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 8,
}


@pytest.mark.parametrize("bias", [False, True])
def test_query_and_key_are_normed_and_biases_are_by_option(bias: bool):
    config = ARCHITECTURE.config(SIZES | {"attention_bias": bias})
    assert (config.qk_norm, config.qkv_bias, config.output_bias, config.mlp_bias) == (True, bias, bias, False)


def test_layer_types_go_before_max_window_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    said = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": kinds}
    assert ARCHITECTURE.config(SIZES | said).windows == (8, None, None)


def test_a_window_that_is_not_used_is_none():
    assert ARCHITECTURE.config(SIZES | {"use_sliding_window": False, "sliding_window": 8}).windows == ()
