from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import LayerNorm, Norm, weights_in
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, gguf_config, tensors, windows

SLIDES, FULL = "sliding_attention", "full_attention"


def cohere(**said: Any) -> Model:
    return build("Cohere2MoeForCausalLM", **{"head_dim": 4} | said)


def dense(**said: Any) -> Model:
    """One without mixtures, in as many layers as its attention names."""
    return cohere(mlp_layer_types=["dense"] * said.get("num_hidden_layers", 3), **said)


def test_the_first_layers_have_a_pattern_of_their_own():
    said = {"num_hidden_layers": 8, "first_k_dense_replace": 3, "sliding_window": 8}
    assert windows(cohere(**said, prefix_dense_sliding_window_pattern=2)) == (8, None, 8, 8, 8, 8, None, 8)
    assert windows(cohere(**said)) == (None, None, None, 8, 8, 8, None, 8)
    assert windows(cohere(num_hidden_layers=3, layer_types=[FULL, SLIDES, FULL])) == (None, 4096, None)


def test_layers_that_see_everything_have_positions_where_they_are_dense_and_of_pattern_one():
    said = {"layer_types": [FULL, SLIDES, FULL]}
    assert [spec.rope is None for spec in attentions(dense(**said))] == [False] * 3
    two = attentions(dense(**said, prefix_dense_sliding_window_pattern=2))
    assert [spec.rope is None for spec in two] == [True, False, True]
    assert all(spec.rope is None or spec.rope.interleaved for spec in two)


def test_norms_are_of_one_kind_or_the_other():
    kinds = {type(weight) for weight in weights_in(cohere().weights) if isinstance(weight, Norm | LayerNorm)}
    assert kinds == {LayerNorm}
    own = [w for w in weights_in(cohere(rms_norm_eps=1e-3).weights) if isinstance(w, Norm | LayerNorm)]
    assert {(type(weight), weight.eps) for weight in own} == {(Norm, 1e-3)}


def test_dense_layers_have_a_width_of_their_own_and_shared_experts_are_one_mlp():
    shapes = tensors(cohere(first_k_dense_replace=1, prefix_dense_intermediate_size=40, num_shared_experts=2))
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (40, 16)
    assert shapes["model.layers.1.mlp.shared_experts.up_proj.weight"] == (48, 16)
    assert shapes["model.layers.1.mlp.experts.1.up_proj.weight"] == (24, 16)
    assert not any("shared" in name for name in tensors(cohere()))


def test_biases_are_the_attentions_and_by_option():
    assert biases(cohere(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}


def test_layers_that_predict_further_tokens_are_left_out():
    assert cohere(num_nextn_predict_layers=1).other_parts == ("layers.3.", "blk.3.")


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"use_parallel_block": False}, "use_parallel_block"),
        ({"expert_selection_fn": "tanh"}, "expert_selection_fn"),
        ({"num_shared_experts": 1, "shared_expert_combination_strategy": "max"}, "combination_strategy"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"layer_types": [FULL] * 2}, "layer_types"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"sliding_window": 0}, "sliding_window"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        cohere(**said)


def test_defaults_are_the_configurations_own():
    said = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = build_model({"architectures": ["Cohere2MoeForCausalLM"], **said})
    assert (model.context_length, model.state[0].key_dim, model.state[0].heads) == (8192, 128, 2)
    assert windows(model) == (4096, 4096, 4096, None)
    assert sum("experts" in name for name in tensors(model)) == 4 * 8 * 3
    assert "lm_head.weight" not in tensors(model)


def test_a_gguf_file_counts_layers_that_predict_further_tokens():
    said = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 48}
    own = {"nextn_predict_layers": 1, "leading_dense_block_count": 1, "expert_shared_feed_forward_length": 96}
    own |= {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True, True, False, True, False]}
    config = gguf_config("cohere2moe", **said | own)
    expected = {"num_hidden_layers": 5, "num_nextn_predict_layers": 1, "num_shared_experts": 2}
    expected |= {"layer_types": [FULL, SLIDES, SLIDES, FULL, SLIDES], "expert_selection_fn": "sigmoid"}
    assert {key: config[key] for key in expected} == expected
