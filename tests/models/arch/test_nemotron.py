from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import LayerNorm, RopeConfig, weights_in
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, gguf_config

NORMS = {"input_layernorm", "post_attention_layernorm"}


def nemotron(**said: Any) -> Model:
    return build("NemotronForCausalLM", **said)


def test_all_norms_are_stored_less_1():
    norms = [weight for weight in weights_in(nemotron().weights) if isinstance(weight, LayerNorm)]
    assert [norm.offset for norm in norms] == [1.0] * 7


def test_the_mlps_middle_is_squared_where_it_is_positive_unless_it_is_said_otherwise():
    assert noted(nemotron()).activations == ["relu2"] * 3
    assert noted(nemotron(hidden_act="gelu")).activations == ["gelu"] * 3


def test_half_of_a_head_turns_unless_more_is_said():
    assert attentions(nemotron(head_dim=8))[0].rope == RopeConfig(4, 10000.0)
    assert attentions(nemotron(head_dim=8, partial_rotary_factor=0.75))[0].rope == RopeConfig(6, 10000.0)


def test_biases_of_projections_are_by_option():
    assert biases(nemotron()) == NORMS
    assert biases(nemotron(attention_bias=True)) == NORMS | {f"self_attn.{part}_proj" for part in "qkvo"}
    assert biases(nemotron(mlp_bias=True)) == NORMS | {"mlp.up_proj", "mlp.down_proj"}


def test_a_gguf_says_how_much_of_a_head_turns():
    assert gguf_config("nemotron")["partial_rotary_factor"] == 1.0
    assert gguf_config("nemotron", **{"rope.dimension_count": 8})["partial_rotary_factor"] == 0.5


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_act 'xielu' is not supported"):
        nemotron(hidden_act="xielu")
