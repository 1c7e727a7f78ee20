from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import PositionScale, RopeConfig
from tests.models.arch.attentions import Noting
from tests.models.arch.declared import build, gguf_config, tensors

CHUNKED, FULL = "chunked_attention", "full_attention"


def llama4(**said: Any) -> Model:
    return build("Llama4ForCausalLM", **{"num_key_value_heads": 2, "head_dim": 4, "intermediate_size_mlp": 20} | said)


def noted(model: Model) -> Noting:
    ops: Any = Noting()
    model.forward(ops)
    return ops


def dense(**said: Any) -> Model:
    """One without mixtures."""
    return llama4(moe_layers=[], **said)


def test_layers_with_positions_see_their_chunk_and_the_others_everything():
    attentions = noted(dense(num_hidden_layers=5)).attentions
    assert [attentions[layer].chunk for layer in range(5)] == [8192, 8192, 8192, None, 8192]
    assert [attentions[layer].rope is None for layer in range(5)] == [False, False, False, True, False]
    assert attentions[0].rope == RopeConfig(4, 500_000.0, interleaved=True)


def test_layers_may_be_told_apart_by_two_lists():
    said = {"no_rope_layers": [0, 1, 1, 1], "layer_types": [CHUNKED, FULL, CHUNKED], "attention_chunk_size": 7}
    attentions = noted(dense(**said)).attentions
    assert [attentions[layer].chunk for layer in range(3)] == [7, None, 7]
    assert [attentions[layer].rope is None for layer in range(3)] == [True, False, False]


def test_null_is_no_chunk_and_an_absent_size_is_the_published_one():
    assert noted(dense(attention_chunk_size=None)).attentions[0].chunk is None
    assert noted(dense()).attentions[0].chunk == 8192


def test_queries_without_positions_grow_with_their_place_and_the_others_are_normed():
    ops = noted(dense(no_rope_layer_interval=3, floor_scale=10, attn_scale=0.5))
    assert ops.position_scales == [PositionScale(0.5, 10, shift=1)]
    assert ops.normed.count("") == 4
    ops = noted(dense(no_rope_layer_interval=3, attn_temperature_tuning=False, use_qk_norm=False))
    assert (ops.position_scales, ops.normed.count("")) == ([], 0)


@pytest.mark.parametrize(
    ("said", "sparse"),
    [
        ({}, {0, 1, 2}),
        ({"interleave_moe_layer_step": 2}, {1}),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0]}, {0}),
        ({"moe_layers": []}, set()),
    ],
)
def test_layers_are_mixtures_by_step_or_by_list(said: dict[str, Any], sparse: set[int]):
    shapes = tensors(llama4(**said))
    place = "model.layers.{}.feed_forward"
    assert {layer for layer in range(3) if f"{place.format(layer)}.router.weight" in shapes} == sparse
    for layer in range(3):
        own = f"{place.format(layer)}.shared_expert" if layer in sparse else place.format(layer)
        assert shapes[f"{own}.up_proj.weight"] == (24 if layer in sparse else 20, 16)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"layer_types": [FULL, FULL]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": [CHUNKED] * 3, "attention_chunk_size": None}, "attention_chunk_size"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "use_qk_norm"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        llama4(**said)


def test_defaults_are_the_configurations_own():
    layers = {"num_hidden_layers": 1}
    model = build_model({"architectures": ["Llama4ForConditionalGeneration"], "text_config": layers})
    assert (model.config.vocab_size, model.config.num_heads, model.context_length) == (202048, 40, 131072)
    assert model.state[0].heads == 8
    assert "vision_model." in model.other_parts


def test_a_gguf_file_leaves_out_what_the_published_models_have_in_common():
    said = {"expert_count": 16, "expert_used_count": 1, "expert_feed_forward_length": 48}
    config = gguf_config("llama4", **said, interleave_moe_layer_step=2)
    expected = {"attention_chunk_size": 8192, "use_qk_norm": True, "interleave_moe_layer_step": 2}
    expected |= {"intermediate_size": 48, "intermediate_size_mlp": 96}
    assert {key: config[key] for key in expected} == expected
    assert not gguf_config("llama4", **said | {"expert_count": 128})["use_qk_norm"]
    without = gguf_config("llama4", **said | {"attention.sliding_window": 0})
    assert (without["attention_chunk_size"], without["no_rope_layers"]) == (None, [1] * 6)


def test_ollamas_converter_says_some_of_it():
    said = {"expert_count": 128, "expert_used_count": 1, "expert_feed_forward_length": 48}
    config = gguf_config("llama4", **said | {"attention.chunk_size": 64, "use_qk_norm": True})
    assert (config["attention_chunk_size"], config["use_qk_norm"]) == (64, True)
