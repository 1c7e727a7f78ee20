from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops.rope import YarnScaling
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, gguf_config, tensors, windows

SLIDES, FULL = "sliding_attention", "full_attention"


def laguna(**said: Any) -> Model:
    return build("LagunaForCausalLM", **{"num_key_value_heads": 2, "head_dim": 8} | said)


def dense(**said: Any) -> Model:
    """One without mixtures."""
    return laguna(mlp_layer_types=["dense"] * 3, **said)


def test_layers_have_heads_of_their_own_number():
    model = laguna(num_attention_heads_per_layer=[2, 6, 4])
    shapes = tensors(model)
    assert [shapes[f"model.layers.{n}.self_attn.q_proj.weight"][0] for n in range(3)] == [16, 48, 32]
    assert [shapes[f"model.layers.{n}.self_attn.g_proj.weight"][0] for n in range(3)] == [2, 6, 4]
    assert [state.heads for state in model.state] == [2, 2, 2]
    assert model.config.num_heads == 6


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ({}, [4, 4, 4]),
        ({"gating": True}, [4, 4, 4]),
        ({"gating": "per-element"}, [32, 32, 32]),
        ({"gating_types": ["per_head", "per_element", "per_head"]}, [4, 32, 4]),
    ],
)
def test_a_gate_is_of_heads_or_of_every_value(said: dict[str, Any], rows: list[int]):
    shapes = tensors(laguna(**said))
    assert [shapes[f"model.layers.{n}.self_attn.g_proj.weight"][0] for n in range(3)] == rows


@pytest.mark.parametrize(
    ("said", "sparse"),
    [
        ({}, {1, 2}),
        ({"mlp_layer_types": ["sparse", "dense", "dense"]}, {0}),
        ({"mlp_only_layers": [0, 1]}, {2}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, {1}),
    ],
)
def test_layers_are_mixtures_by_either_list(said: dict[str, Any], sparse: set[int]):
    shapes = tensors(laguna(**said))
    assert {n for n in range(3) if f"model.layers.{n}.mlp.gate.weight" in shapes} == sparse
    assert all(f"model.layers.{n}.mlp.shared_expert.up_proj.weight" in shapes for n in sparse)


def ropes(**said: Any) -> list[Any]:
    return [spec.rope for spec in attentions(dense(layer_types=[FULL, SLIDES, FULL], head_dim=8, **said))][:2]


def test_each_kind_of_layer_has_a_rope_and_there_are_two_that_go_without_saying():
    full, sliding = ropes()
    assert ((full.theta, full.dims), (sliding.theta, sliding.dims)) == ((500_000.0, 4), (10_000.0, 8))
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    plain = {"rope_type": "default", "rope_theta": 9.0}
    for name in (FULL, "global_attention"):
        full, sliding = ropes(rope_parameters={name: yarn, SLIDES: plain})
        assert (full.theta, full.dims, isinstance(full.scaling, YarnScaling)) == (7.0, 4, True)
        assert (sliding.theta, sliding.dims, sliding.scaling) == (9.0, 8, None)


def test_older_words_are_the_full_layers_rope_and_that_of_the_others_beside_it():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    full, sliding = ropes(rope_scaling=yarn, rope_theta=7.0, partial_rotary_factor=0.5)
    assert (full.theta, full.dims, isinstance(full.scaling, YarnScaling)) == (7.0, 4, True)
    assert (sliding.theta, sliding.dims, sliding.scaling) == (7.0, 4, None)
    own = {"rope_theta": 9.0, "partial_rotary_factor": 1.0}
    _, sliding = ropes(rope_parameters=yarn | {"rope_theta": 7.0}, swa_rope_parameters=own)
    assert (sliding.theta, sliding.dims, sliding.scaling) == (9.0, 8, None)


def test_windows_are_those_of_layers_that_slide():
    assert windows(laguna(layer_types=[FULL, SLIDES, SLIDES], sliding_window=7)) == (None, 7, 7)
    assert windows(laguna()) == (None, None, None)


def test_biases_are_the_attentions_and_by_option():
    assert biases(laguna(attention_bias=True)) >= {f"self_attn.{part}_proj" for part in "qkvo"}


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"gating": False}, "gating"),
        ({"gating": "per-layer"}, "gating"),
        ({"gating_types": ["per_head"]}, "gating"),
        ({"num_attention_heads_per_layer": [4, 4]}, "num_attention_heads_per_layer"),
        ({"num_attention_heads_per_layer": [4, 4, 5]}, "num_attention_heads_per_layer"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"rope_parameters": {FULL: {}, "other": {}}}, "rope_parameters"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        laguna(**said)


def test_defaults_are_the_configurations_own():
    said = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = build_model({"architectures": ["LagunaForCausalLM"], **said})
    assert (model.context_length, model.state[0].key_dim, model.state[0].heads) == (131072, 128, 8)
    assert tensors(model)["model.layers.1.mlp.gate.weight"] == (256, 8)
    assert tensors(model)["model.layers.1.mlp.experts.e_score_correction_bias"] == (256,)


def test_a_gguf_file_says_what_differs_by_layer():
    own = {
        "attention.head_count": [4, 6, 6, 6, 4, 6],
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "rope.dimension_count": 8,
        "rope.dimension_count_swa": 16,
        "rope.freq_base": 500.0,
        "rope.freq_base_swa": 50.0,
        "attention.sliding_window": 7,
        "leading_dense_block_count": 2,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 48,
        "expert_weights_scale": 2.5,
    }
    config = gguf_config("laguna", **own)
    expected = {
        "num_attention_heads_per_layer": [4, 6, 6, 6, 4, 6],
        "num_attention_heads": 6,
        "layer_types": [FULL, SLIDES, SLIDES, SLIDES, FULL, SLIDES],
        "mlp_layer_types": ["dense", "dense", *["sparse"] * 4],
        "gating_types": ["per-head"] * 6,
        "moe_routed_scaling_factor": 2.5,
        "shared_expert_intermediate_size": 48,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            SLIDES: {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    }
    assert {key: config[key] for key in expected} == expected
    everything = gguf_config("laguna", **own | {"attention.sliding_window": 0})
    assert everything["layer_types"] == [FULL] * 6
