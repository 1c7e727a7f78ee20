from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import RopeConfig
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, gguf_config, tensors


def glm4(**said: Any) -> Model:
    return build("Glm4ForCausalLM", **{"head_dim": 8} | said)


def glm(**said: Any) -> Model:
    return build("GlmForCausalLM", **{"head_dim": 8} | said)


def test_each_branch_is_between_two_norms_in_a_glm4_0414_and_behind_one_in_the_first():
    layer = "model.layers.0"
    assert noted(glm4(num_hidden_layers=1)).normed == [
        f"{layer}.input_layernorm",
        f"{layer}.post_self_attn_layernorm",
        f"{layer}.post_attention_layernorm",
        f"{layer}.post_mlp_layernorm",
        "model.norm",
    ]
    assert noted(glm(num_hidden_layers=1)).normed == [
        f"{layer}.input_layernorm",
        f"{layer}.post_attention_layernorm",
        "model.norm",
    ]


def test_half_of_a_head_turns_and_pairs_neighbours_unless_more_is_said():
    assert {spec.rope for spec in attentions(glm4())} == {RopeConfig(4, 10000.0, interleaved=True)}
    assert attentions(glm(partial_rotary_factor=0.75))[0].rope == RopeConfig(6, 10000.0, interleaved=True)


def test_queries_keys_and_values_have_biases_unless_it_is_said_that_they_have_none():
    assert biases(glm4()) == {f"self_attn.{part}_proj" for part in "qkv"}
    assert biases(glm4(attention_bias=False)) == set()


def test_gate_and_up_are_one_matrix():
    assert tensors(glm4())["model.layers.1.mlp.gate_up_proj.weight"] == (2 * 24, 16)


def test_a_gguf_says_how_much_of_a_head_turns():
    assert gguf_config("glm4", **{"rope.dimension_count": 8})["partial_rotary_factor"] == 0.5
    assert gguf_config("glm4")["partial_rotary_factor"] == 1.0


@pytest.mark.parametrize("said", [{"nextn_predict_layers": 1}, {"rope.dimension_sections": [8, 12, 12, 0]}])
def test_layers_and_ropes_of_its_relatives_are_refused_by_name(said: dict[str, Any]):
    with pytest.raises(CheckpointError, match=rf"glm4\.{next(iter(said))}, which is not supported"):
        gguf_config("glm4", **said)
