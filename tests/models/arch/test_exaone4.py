from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import build, gguf_config, tensors, windows


def exaone4(**said: Any) -> Model:
    return build("Exaone4ForCausalLM", **{"num_hidden_layers": 4} | said)


def has_positions(model: Model) -> list[bool]:
    return [spec.rope is not None for spec in attentions(model)]


def test_norms_are_behind_the_branches_and_on_each_heads_query_and_key():
    model = exaone4(num_hidden_layers=1)
    layer = "model.layers.0"
    assert noted(model).normed == [
        f"{layer}.self_attn.q_norm",
        f"{layer}.self_attn.k_norm",
        f"{layer}.post_attention_layernorm",
        f"{layer}.post_feedforward_layernorm",
        "model.norm",
    ]
    assert [tensors(model)[f"{layer}.self_attn.{part}_norm.weight"] for part in "qk"] == [(4,), (4,)]


def test_layers_that_see_everything_have_no_positions():
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = exaone4(sliding_window=8, sliding_window_pattern="LLLG", layer_types=kinds)
    assert windows(model) == (None, 8, None, None)
    assert has_positions(model) == [False, True, False, False]
    assert windows(exaone4()) == (4096, 4096, 4096, None)
    assert windows(exaone4(sliding_window_pattern=2)) == (4096, None) * 2


def test_without_a_window_all_layers_have_positions():
    model = exaone4(sliding_window=None, layer_types=["full_attention"] * 4)
    assert windows(model) == (None,) * 4
    assert has_positions(model) == [True] * 4


def test_a_ggufs_window_may_be_absent():
    assert gguf_config("exaone4")["sliding_window"] is None
    said = gguf_config("exaone4", block_count=4, **{"attention.sliding_window": 8})
    assert said["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}"):
        exaone4(**change)


def test_a_layer_that_predicts_further_tokens_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"exaone4\.nextn_predict_layers, which is not supported"):
        gguf_config("exaone4", nextn_predict_layers=1)
