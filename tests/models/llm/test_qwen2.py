from typing import Any

import pytest

from models.llm.qwen2 import ARCHITECTURE

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "sliding_window": 8,
}


def test_query_key_and_value_have_a_bias_and_nothing_else_has():
    config = ARCHITECTURE.config(SIZES)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)


@pytest.mark.parametrize("said", [{}, {"use_sliding_window": False}, {"use_sliding_window": None}])
def test_a_window_that_is_not_used_is_none(said: dict[str, Any]):
    assert ARCHITECTURE.config(SIZES | {"max_window_layers": 0} | said).windows == ()


def test_the_window_is_on_the_layers_from_max_window_layers_on():
    config = ARCHITECTURE.config(SIZES | {"use_sliding_window": True, "max_window_layers": 1})
    assert config.windows == (None, 8, 8)


def test_the_window_begins_at_layer_28_where_nothing_is_said():
    config = ARCHITECTURE.config(SIZES | {"use_sliding_window": True, "num_hidden_layers": 30})
    assert config.windows == (None,) * 28 + (8, 8)
