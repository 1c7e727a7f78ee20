from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import KV, Norm, RopeConfig, weights_in
from models.ops.rope import LinearScaling
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, gguf_config, tensors, windows


def gemma2(**said: Any) -> Model:
    return build("Gemma2ForCausalLM", **{"head_dim": 8} | said)


def gemma3(**said: Any) -> Model:
    return build("Gemma3ForCausalLM", **{"head_dim": 8} | said)


def test_each_branch_is_normed_before_and_behind():
    layer = "model.layers.0"
    assert noted(gemma2(num_hidden_layers=1)).normed == [
        f"{layer}.input_layernorm",
        f"{layer}.post_attention_layernorm",
        f"{layer}.pre_feedforward_layernorm",
        f"{layer}.post_feedforward_layernorm",
        "model.norm",
    ]
    assert f"{layer}.self_attn.q_norm" in noted(gemma3(num_hidden_layers=1)).normed


def test_every_norms_weight_is_stored_less_one():
    offsets = {norm.offset for norm in weights_in(gemma3().weights) if isinstance(norm, Norm)}
    assert offsets == {1.0}


def test_embeddings_are_scaled_by_the_root_of_their_width():
    assert noted(gemma2()).factors == noted(gemma3()).factors == [4.0]


def test_every_other_layer_of_a_gemma_2_has_the_window():
    assert windows(gemma2(num_hidden_layers=4)) == (4096, None, 4096, None)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(gemma2(layer_types=kinds, sliding_window=7)) == (None, 7, None)


@pytest.mark.parametrize(("said", "expected"), [({}, 50.0), ({"attn_logit_softcapping": None}, None)])
def test_the_scores_of_a_gemma_2_have_a_softcap_unless_the_configuration_says_null(said: dict[str, Any], expected: Any):
    assert {spec.softcap for spec in attentions(gemma2(**said))} == {expected}


def test_the_scale_of_scores_is_not_the_heads_width():
    assert {spec.scale for spec in attentions(gemma2(query_pre_attn_scalar=16))} == {0.25}


def test_the_last_of_every_six_layers_of_a_gemma_3_sees_everything_and_has_a_rope_of_its_own():
    specs = attentions(gemma3(num_hidden_layers=12, rope_scaling={"rope_type": "linear", "factor": 8.0}))
    everything = RopeConfig(8, 1_000_000.0, LinearScaling(8.0))
    assert [spec.window for spec in specs] == [*[4096] * 5, None] * 2
    assert [spec.rope for spec in specs] == [*[RopeConfig(8, 10000.0)] * 5, everything] * 2


def test_a_published_text_config_leaves_most_sizes_to_their_defaults():
    said: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "sliding_window": 1024}
    model = build_model({"architectures": ["Gemma3ForCausalLM"]} | said)
    assert (model.config.vocab_size, model.config.num_heads, model.state) == (262208, 8, (KV(4, 256, 256, 1024),))
    assert tensors(model)["model.layers.0.self_attn.q_norm.weight"] == (256,)


@pytest.mark.parametrize("key", ["head_dim", "hidden_activation", "tie_word_embeddings", "query_pre_attn_scalar"])
def test_null_is_as_good_as_absent(key: str):
    said, unsaid = (build("Gemma3ForCausalLM", **change) for change in ({key: None}, {}))
    assert (said.weights, attentions(said)) == (unsaid.weights, attentions(unsaid))
    assert set(noted(said).activations) == {"gelu_tanh"}


def test_biases_are_the_attentions_and_by_option():
    assert biases(gemma3(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is for models of embeddings"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"hidden_activation": "mish"}, "hidden_activation 'mish' is not supported"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must have settings for"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        gemma3(**change)


def test_a_gemma_for_embeddings_has_no_words_and_sees_half_a_window_to_each_side():
    model = build("Gemma3TextModel", use_bidirectional_attention=True, sliding_window=16)
    assert (model.is_encoder, model.state) == (True, ())
    specs = attentions(model)
    assert {spec.window for spec in specs} <= {9, None}
    assert all(spec.bidirectional for spec in specs)
    with pytest.raises(CheckpointError, match="use_bidirectional_attention must be true"):
        build("Gemma3TextModel", use_bidirectional_attention=False)


HEADS = {"attention.key_length": 8}
WINDOW = {"attention.sliding_window": 16}


@pytest.mark.parametrize(
    ("arch", "layers", "expected"), [("gemma2", 6, 8), ("gemma2", 46, 16), ("gemma3", 46, 8), ("gemma3", 62, 16)]
)
def test_a_ggufs_scores_are_scaled_by_the_heads_width_but_in_the_largest_model(arch: str, layers: int, expected: int):
    assert gguf_config(arch, block_count=layers, **HEADS)["query_pre_attn_scalar"] == expected


def test_a_gguf_says_the_pattern_of_windows_by_a_list_or_a_number_or_not_at_all():
    full, sliding = "full_attention", "sliding_attention"
    assert gguf_config("gemma3", **WINDOW)["layer_types"] == [*[sliding] * 5, full]
    assert gguf_config("gemma2", **WINDOW)["layer_types"] == [sliding, full] * 3
    pattern, listed = "attention.sliding_window_pattern", [True, False, False, True, True, False]
    assert gguf_config("gemma3", **WINDOW, **{pattern: 3})["layer_types"] == [sliding, sliding, full] * 2
    said = gguf_config("gemma3", **WINDOW, **{pattern: listed})["layer_types"]
    assert said == [sliding if slides else full for slides in listed]
    assert gguf_config("gemma3", **{"attention.sliding_window": 0})["layer_types"] == [full] * 6


def test_a_gguf_without_softcaps_has_the_familys():
    config = gguf_config("gemma2", **HEADS) | {"architectures": ["Gemma2ForCausalLM"]}
    assert {spec.softcap for spec in attentions(build_model(config))} == {50.0}
    said = gguf_config("gemma2", attn_logit_softcapping=6.0, final_logit_softcapping=9.0)
    assert (said["attn_logit_softcapping"], said["final_logit_softcapping"]) == (6.0, 9.0)


def test_ollamas_own_keys_of_a_gemma_3_are_read():
    said = gguf_config("gemma3", **{"rope.global.freq_base": 500.0, "rope.local.freq_base": 50.0})
    assert (said["rope_theta"], said["rope_local_base_freq"], said["rms_norm_eps"]) == (500.0, 50.0, 1e-6)
    stretched = gguf_config("gemma3", context_length=131072)
    assert stretched["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert said["rope_scaling"] is None
