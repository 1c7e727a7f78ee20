from typing import Any

import pytest

from models.arch import Model, gguf_layout
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import RopeConfig
from models.ops.rope import LinearScaling
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, tensors, windows


def olmo2(**said: Any) -> Model:
    return build("Olmo2ForCausalLM", **said)


def olmo3(**said: Any) -> Model:
    return build("Olmo3ForCausalLM", **said)


def test_norms_are_behind_the_branches_and_over_all_queries_and_all_keys():
    model = olmo2(num_hidden_layers=1, num_key_value_heads=2)
    layer = "model.layers.0"
    assert noted(model).normed == [
        f"{layer}.self_attn.q_norm",
        f"{layer}.self_attn.k_norm",
        f"{layer}.post_attention_layernorm",
        f"{layer}.post_feedforward_layernorm",
        "model.norm",
    ]
    assert [tensors(model)[f"{layer}.self_attn.{part}_norm.weight"] for part in "qk"] == [(16,), (8,)]
    assert f"{layer}.input_layernorm.weight" not in tensors(model)


def test_an_olmo_2_has_no_window_and_the_last_of_every_four_layers_of_an_olmo_3_has_none():
    assert windows(olmo2(num_hidden_layers=4, sliding_window=8)) == (None,) * 4
    assert windows(olmo3(num_hidden_layers=8, sliding_window=8)) == (8, 8, 8, None) * 2
    assert windows(olmo3(layer_types=["full_attention", "sliding_attention", "full_attention"])) == (None, 4096, None)


def test_the_older_forms_scaling_is_that_of_the_layers_that_see_everything():
    scaling = {"rope_type": "linear", "factor": 2.0}
    said = attentions(olmo3(num_hidden_layers=4, rope_theta=100.0, rope_scaling=scaling))
    assert [spec.rope for spec in said] == [*[RopeConfig(4, 100.0)] * 3, RopeConfig(4, 100.0, LinearScaling(2.0))]
    assert attentions(olmo3())[0].rope == RopeConfig(4, 500_000.0)


def test_biases_are_the_attentions_and_by_option():
    assert biases(olmo2(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}


@pytest.mark.parametrize(("window", "expected"), [(None, "Olmo2ForCausalLM"), (8, "Olmo3ForCausalLM")])
def test_a_gguf_with_a_window_is_an_olmo_3(window: int | None, expected: str):
    values = {} if window is None else {"olmo2.attention.sliding_window": window}
    layout = gguf_layout(GGUFMetadata({"general.architecture": "olmo2"} | values, {}, lambda _: None, "m"))
    assert layout is not None
    assert layout.hf == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must have settings for"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        olmo3(**change)
