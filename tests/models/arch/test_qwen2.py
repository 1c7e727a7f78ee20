from typing import Any

import pytest

from tests.models.arch.declared import biases, build, tensors, windows


def qwen2(**said: Any):
    return build("Qwen2ForCausalLM", **{"sliding_window": 8} | said)


def test_query_key_and_value_have_a_bias_and_nothing_else_has():
    model = qwen2(num_key_value_heads=2)
    assert biases(model) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert tensors(model)["model.layers.1.self_attn.v_proj.bias"] == (8,)
    assert not any("q_norm" in name for name in tensors(model))


@pytest.mark.parametrize("said", [{}, {"use_sliding_window": False}, {"use_sliding_window": None}])
def test_a_window_that_is_not_used_is_none(said: dict[str, Any]):
    assert windows(qwen2(max_window_layers=0, **said)) == (None,) * 3


@pytest.mark.parametrize(("first", "expected"), [(0, (8, 8, 8)), (1, (None, 8, 8)), (3, (None, None, None))])
def test_the_window_is_on_the_layers_from_max_window_layers_on(first: int, expected: tuple[int | None, ...]):
    assert windows(qwen2(use_sliding_window=True, max_window_layers=first)) == expected


def test_the_window_begins_at_layer_28_where_nothing_is_said():
    assert windows(qwen2(use_sliding_window=True, num_hidden_layers=30)) == (None,) * 28 + (8, 8)
