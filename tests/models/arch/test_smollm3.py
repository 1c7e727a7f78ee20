from typing import Any

import pytest

from models.errors import CheckpointError
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, tensors, windows


def smollm3(**said: Any):
    return build("SmolLM3ForCausalLM", **said)


def has_positions(**said: Any) -> list[bool]:
    return [spec.rope is not None for spec in attentions(smollm3(**said))]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"num_hidden_layers": 8}, [True, True, True, False] * 2),
        ({"num_hidden_layers": 4, "no_rope_layer_interval": 2}, [True, False] * 2),
        ({"no_rope_layers": [0, 1, 0]}, [False, True, False]),
        ({"no_rope_layers": [1, 1, 1]}, [True] * 3),
        ({"no_rope_layers": [0, 0, 1, 0, 0]}, [False, False, True]),
        ({"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 1}, [True, False, True]),
    ],
)
def test_layers_without_positions_are_listed_or_every_so_many(said: dict[str, Any], expected: list[bool]):
    assert has_positions(**said) == expected


def test_the_rope_turns_slowly_where_nothing_is_said():
    thetas = [[spec.rope.theta for spec in attentions(smollm3(**said))] for said in ({}, {"rope_theta": 500.0})]
    assert thetas == [[2_000_000.0] * 3, [500.0] * 3]


def test_the_head_is_tied_unless_it_is_said_not_to_be():
    assert "lm_head.weight" not in tensors(smollm3())
    assert tensors(smollm3(tie_word_embeddings=False))["lm_head.weight"] == (11, 16)


def test_a_window_is_on_the_layers_without_positions():
    said = {"num_hidden_layers": 4, "sliding_window": 8}
    assert windows(smollm3(**said, use_sliding_window=True)) == (None, None, None, 8)
    assert windows(smollm3(**said)) == (None,) * 4


def test_layer_types_say_where_the_window_is_whatever_has_positions():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    said = {"num_hidden_layers": 4, "sliding_window": 8, "use_sliding_window": True, "layer_types": kinds}
    assert windows(smollm3(**said)) == (8, None, None, 8)
    assert has_positions(**said) == [True, True, True, False]


def test_biases_are_by_option():
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert biases(smollm3(attention_bias=True)) == attention
    assert biases(smollm3(mlp_bias=True)) == {f"mlp.{part}_proj" for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must have a number for each of 3 layers"),
        ({"no_rope_layers": [1, 2, 0]}, "no_rope_layers must be a list of true and false"),
        ({"no_rope_layers": "101"}, "no_rope_layers"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}"):
        smollm3(**change)
