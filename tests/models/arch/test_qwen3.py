from typing import Any

import pytest

from tests.models.arch.attentions import noted
from tests.models.arch.declared import biases, build, tensors, windows


def qwen3(**said: Any):
    return build("Qwen3ForCausalLM", **{"head_dim": 8} | said)


def test_each_heads_query_and_key_are_normed_by_weights_of_a_heads_width():
    model = qwen3(num_hidden_layers=1)
    layer = "model.layers.0"
    assert [tensors(model)[f"{layer}.self_attn.{part}_norm.weight"] for part in "qk"] == [(8,), (8,)]
    assert noted(model).normed == [
        f"{layer}.input_layernorm",
        f"{layer}.self_attn.q_norm",
        f"{layer}.self_attn.k_norm",
        f"{layer}.post_attention_layernorm",
        "model.norm",
    ]


@pytest.mark.parametrize(("bias", "expected"), [(False, set()), (True, {f"self_attn.{part}_proj" for part in "qkvo"})])
def test_biases_are_the_attentions_and_by_option(bias: bool, expected: set[str]):
    assert biases(qwen3(attention_bias=bias)) == expected


def test_layer_types_go_before_max_window_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    said = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert windows(qwen3(**said, layer_types=kinds)) == (8, None, None)
    assert windows(qwen3(**said)) == (None, 8, 8)


def test_a_window_that_is_not_used_is_none():
    assert windows(qwen3(use_sliding_window=False, sliding_window=8, max_window_layers=0)) == (None,) * 3
