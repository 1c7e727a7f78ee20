from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import KV
from tests.models.arch.declared import SIZES, build, gguf_config, tensors

SLIDES, FULL = "sliding_attention", "full_attention"


def gemma4(**said: Any) -> Model:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 12, "hidden_size_per_layer_input": 0}
    return build("Gemma4ForCausalLM", **sizes | said)


def test_heads_are_of_two_sizes():
    model = gemma4(layer_types=[SLIDES, FULL, FULL])
    assert model.state == (KV(2, 8, 8, 512), KV(2, 12, 12), KV(2, 12, 12))
    shapes = tensors(model)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (8,)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (48, 16)


def test_all_but_the_last_of_every_six_layers_slide_and_the_last_layer_never_does():
    windows = [state.window for state in gemma4(num_hidden_layers=8).state]
    assert windows == [*[512] * 5, None, 512, None]
    assert gemma4(layer_types=[SLIDES] * 3).state[-1] == KV(2, 12, 12)


def test_layers_that_share_have_no_keys_and_no_state_and_what_they_look_at_holds_everything():
    model = gemma4(num_hidden_layers=6, layer_types=[SLIDES, SLIDES, FULL] * 2, num_kv_shared_layers=3)
    assert model.state == (KV(2, 8, 8, 512), KV(2, 8, 8), KV(2, 12, 12))
    names = {name for name in tensors(model) if name.startswith("model.layers.4.self_attn")}
    assert names == {f"model.layers.4.self_attn.{part}.weight" for part in ("q_proj", "q_norm", "o_proj")}


def test_keys_that_checkpoints_carry_for_layers_that_share_are_passed_over():
    model = gemma4(num_hidden_layers=3, layer_types=[FULL] * 3, num_kv_shared_layers=1)
    assert set(model.other_parts) == {
        f"layers.2.self_attn.{part}." for part in ("k_proj", "v_proj", "k_norm", "v_norm")
    }


def test_layers_that_share_may_have_an_mlp_of_twice_the_width():
    said = {"layer_types": [FULL] * 3, "num_kv_shared_layers": 1}
    shapes = tensors(gemma4(**said, use_double_wide_mlp=True))
    assert [shapes[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in (1, 2)] == [24, 48]
    assert gemma4(**said, use_double_wide_mlp=True).config.intermediate_size == 48
    assert gemma4(**said).config.intermediate_size == 24


def test_where_values_are_keys_full_layers_have_no_matrix_of_values_and_their_own_number_of_heads():
    model = gemma4(layer_types=[SLIDES, FULL, FULL], attention_k_eq_v=True, num_global_key_value_heads=1)
    assert model.state == (KV(2, 8, 8, 512), KV(1, 12, 12), KV(1, 12, 12))
    found = {name for name in tensors(model) if "v_proj" in name}
    assert found == {"model.layers.0.self_attn.v_proj.weight"}


def test_the_heads_of_full_layers_are_the_others_where_values_have_a_matrix():
    assert gemma4(layer_types=[FULL] * 3, num_global_key_value_heads=1).state[0] == KV(2, 12, 12)


def test_there_may_be_a_table_of_embeddings_for_every_layer():
    shapes = tensors(gemma4(hidden_size_per_layer_input=4, vocab_size_per_layer_input=13))
    assert shapes["model.embed_tokens_per_layer.weight"] == (13, 12)
    assert shapes["model.layers.2.per_layer_input_gate.weight"] == (4, 16)
    assert not any("per_layer" in name for name in tensors(gemma4()))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"layer_types": [SLIDES, SLIDES, FULL], "num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"per_layer_config": {}}, "per_layer_config"),
        ({"global_head_dim": 7}, "heads of 7"),
        ({"attention_k_eq_v": True, "num_global_key_value_heads": 3}, "3 key-value heads"),
        ({"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 10}, "10 x 4"),
        ({"hidden_size_per_layer_input": -4}, "-4"),
        ({"enable_moe_block": True, "top_k_experts": 3}, "top_k_experts"),
        ({"enable_moe_block": True, "top_k_experts": 1, "num_experts": None}, "num_experts"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters"),
        ({"hidden_activation": "tanh"}, "hidden_activation"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        gemma4(**said)


def test_attention_that_looks_both_ways_within_pictures_is_causal_in_a_text():
    assert gemma4(use_bidirectional_attention="vision").state == gemma4().state


def test_defaults_are_the_configurations_own():
    layers = {"num_hidden_layers": 6, "layer_types": None, "architectures": ["Gemma4ForConditionalGeneration"]}
    model = build_model({"architectures": layers.pop("architectures"), "text_config": layers})
    assert (model.config.vocab_size, model.config.num_heads, model.context_length) == (262144, 8, 131072)
    assert model.state == (*[KV(4, 256, 256, 512)] * 5, KV(4, 512, 512))
    assert tensors(model)["model.embed_tokens_per_layer.weight"] == (262144, 6 * 256)
    assert "vision_tower." in model.other_parts


def test_a_unified_gemma_4_has_defaults_of_its_own_and_no_embeddings_for_layers():
    model = build_model({"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": {}})
    assert (model.context_length, model.state[0]) == (262144, KV(4, 256, 256, 1024))
    assert not any("per_layer" in name or "experts" in name for name in tensors(model))


def test_a_gguf_file_says_what_differs_by_layer():
    config = gguf_config(
        "gemma4",
        {"rope_freqs.weight": [1.0, 1e30]},
        **{
            "attention.key_length": 4,
            "attention.key_length_swa": 2,
            "rope.dimension_count": 4,
            "attention.head_count_kv": [2, 2, 1] * 2,
            "feed_forward_length": [96] * 4 + [192] * 2,
            "attention.sliding_window": 7,
            "attention.sliding_window_pattern": [True, True, False] * 2,
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 0,
        },
    )
    expected: dict[str, Any] = {
        "head_dim": 2,
        "global_head_dim": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": [SLIDES, SLIDES, FULL] * 2,
        "intermediate_size": 96,
        "use_double_wide_mlp": True,
        "num_kv_shared_layers": 2,
        "enable_moe_block": False,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"][FULL] == {"rope_type": "factors", "factors": [1.0, 1e30], "rope_theta": 1000000.0}
    assert not {"rope_theta", "rope_scaling"} & set(config)
    assert SIZES["vocab_size"] == config["vocab_size"]
