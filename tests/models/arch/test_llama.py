from typing import Any

import pytest

from models.errors import CheckpointError
from models.ops import KV, RopeConfig
from models.ops.rope import LinearScaling
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, tensors, windows

PROJECTIONS = {f"self_attn.{part}_proj" for part in "qkvo"}
MLP = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}


def llama(**said: Any):
    return build("LlamaForCausalLM", **said)


def mistral(**said: Any):
    return build("MistralForCausalLM", **said)


def test_a_llama_declares_these_tensors_and_no_other():
    found = tensors(llama(num_hidden_layers=1, num_key_value_heads=2))
    layer = "model.layers.0"
    assert found == {
        "model.embed_tokens.weight": (11, 16),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.post_attention_layernorm.weight": (16,),
        f"{layer}.mlp.gate_proj.weight": (24, 16),
        f"{layer}.mlp.up_proj.weight": (24, 16),
        f"{layer}.mlp.down_proj.weight": (16, 24),
        "model.norm.weight": (16,),
        "lm_head.weight": (11, 16),
    }


def test_a_tied_head_has_no_tensor_of_its_own():
    tied, untied = (set(tensors(llama(tie_word_embeddings=flag))) for flag in (True, False))
    assert untied - tied == {"lm_head.weight"}
    assert "lm_head.weight" in tensors(llama())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, set()),
        ({"attention_bias": True}, PROJECTIONS),
        ({"mlp_bias": True}, MLP),
        ({"attention_bias": True, "mlp_bias": True}, PROJECTIONS | MLP),
    ],
)
def test_attention_and_mlp_have_biases_each_by_their_option(said: dict[str, Any], expected: set[str]):
    assert biases(llama(**said)) == expected


def test_a_bias_is_as_long_as_its_projections_output():
    found = tensors(llama(attention_bias=True, mlp_bias=True, num_key_value_heads=2))
    assert found["model.layers.0.self_attn.k_proj.bias"] == (8,)
    assert found["model.layers.0.mlp.down_proj.bias"] == (16,)


@pytest.mark.parametrize(("window", "expected"), [(8, 8), (None, None), (0, None)])
def test_a_mistrals_window_is_every_layers(window: int | None, expected: int | None):
    assert windows(mistral(sliding_window=window)) == (expected,) * 3
    assert [spec.window for spec in attentions(mistral(sliding_window=window))] == [expected] * 3


def test_layer_types_say_which_layers_of_a_mistral_have_the_window():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(mistral(sliding_window=8, layer_types=kinds)) == (8, None, 8)


@pytest.mark.parametrize(
    "kinds",
    [
        ["full_attention"] * 2,
        ["full_attention"] * 4,
        ["full_attention", "full_attention", "linear_attention"],
        [1, 2, 3],
    ],
)
def test_layer_types_that_fit_no_layer_are_refused(kinds: list[Any]):
    with pytest.raises(CheckpointError, match="layer_types"):
        mistral(sliding_window=8, layer_types=kinds)


def test_a_llama_has_no_window_whatever_its_configuration_carries():
    assert windows(llama(sliding_window=8)) == (None,) * 3


def test_sizes_that_are_not_said_follow_from_others():
    model = llama()
    assert model.state == (KV(4, 4, 4),) * 3
    (spec, *_) = attentions(model)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.scale) == (4, 4, 4, 0.5)
    assert spec.rope == RopeConfig(4, 10000.0)
    assert (model.context_length, model.config.vocab_size, model.config.intermediate_size) == (2048, 11, 24)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_scaling", "rms_norm_eps", "hidden_act"])
def test_null_is_as_good_as_absent(key: str):
    said, unsaid = llama(**{key: None}), llama()
    assert (said.weights, said.state, said.config) == (unsaid.weights, unsaid.state, unsaid.config)
    assert attentions(said) == attentions(unsaid)


def test_an_explicit_head_dim_goes_before_the_derived_one():
    model = llama(head_dim=10, num_key_value_heads=2)
    found = tensors(model)
    assert model.state[0] == KV(2, 10, 10)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (40, 16)
    assert found["model.layers.0.self_attn.o_proj.weight"] == (16, 40)
    assert attentions(model)[0].rope == RopeConfig(10, 10000.0)


def test_part_of_a_head_may_be_rotated():
    assert attentions(llama(head_dim=8, partial_rotary_factor=0.5))[0].rope == RopeConfig(4, 10000.0)


def test_the_rope_is_the_configurations():
    scaling = {"rope_type": "linear", "factor": 4.0}
    ropes = [spec.rope for spec in attentions(llama(rope_theta=500.0, rope_scaling=scaling))]
    assert ropes == [RopeConfig(4, 500.0, LinearScaling(4.0))] * 3


def test_yarn_reaches_further_than_the_context_that_is_said():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert llama(max_position_embeddings=1024, rope_scaling=yarn).context_length == 4096
    assert llama(max_position_embeddings=8192, rope_scaling=yarn).context_length == 8192


@pytest.mark.parametrize(
    ("named", "used"),
    [(None, "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")],
)
def test_the_activation_is_the_configurations(named: str | None, used: str):
    assert noted(llama(hidden_act=named)).activations == [used] * 3


def test_norms_come_before_attention_and_mlp_and_at_the_end():
    ops = noted(llama(num_hidden_layers=1))
    layer = "model.layers.0"
    assert ops.normed == [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    assert noted(llama()).residuals == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 16.5}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor leaves 1"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor leaves 0"),
        ({"rope_theta": 1}, "rope_theta must be above 1"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor is missing"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        llama(**change)
