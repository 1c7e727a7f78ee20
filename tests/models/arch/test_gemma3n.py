from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.executors.onnx.values import Lookup
from models.ops import KV, Embedding, weights_in
from tests.models.arch.declared import build, gguf_config, tensors

KV_HEADS = {"attention.head_count_kv": 2}
SLIDES, FULL = "sliding_attention", "full_attention"


def gemma3n(**said: Any) -> Model:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4}
    return build("Gemma3nForCausalLM", **sizes | {"vocab_size_per_layer_input": 9, "laurel_rank": 3} | said)


def test_all_but_the_last_of_every_five_layers_slide():
    windows = [state.window for state in gemma3n(num_hidden_layers=6, sliding_window=7).state]
    assert windows == [7, 7, 7, 7, None, 7]


def test_layers_that_share_have_no_keys_and_what_they_look_at_holds_everything():
    model = gemma3n(num_hidden_layers=5, layer_types=[SLIDES, SLIDES, FULL, SLIDES, FULL], num_kv_shared_layers=2)
    assert model.state == (KV(2, 8, 8, 512), KV(2, 8, 8), KV(2, 8, 8))
    names = {name for name in tensors(model) if name.startswith("model.layers.4.self_attn")}
    assert names == {f"model.layers.4.self_attn.{part}.weight" for part in ("q_proj", "q_norm", "o_proj")}


def test_keys_that_checkpoints_carry_for_layers_that_share_are_passed_over():
    said = {"num_hidden_layers": 3, "layer_types": [SLIDES] * 3, "num_kv_shared_layers": 1}
    parts = {f"layers.2.self_attn.{part}." for part in ("k_proj", "v_proj", "k_norm", "v_norm")}
    assert set(gemma3n(**said).other_parts) == parts
    whole = {"architectures": ["Gemma3nForConditionalGeneration"], "text_config": {**said, "hidden_size": 16}}
    assert parts < set(build_model(whole).other_parts)
    assert "vision_tower." in build_model(whole).other_parts


def test_every_stream_but_one_has_a_matrix_to_make_it_and_one_to_bring_it_back():
    shapes = tensors(gemma3n(altup_num_inputs=3))
    found = {name for name in shapes if name.startswith("model.altup_")}
    assert found == {f"model.altup_{kind}projections.{n}.weight" for kind in ("", "unembed_") for n in (0, 1)}
    assert shapes["model.layers.0.altup.prediction_coefs.weight"] == (9, 3)
    assert shapes["model.layers.0.laurel.linear_left.weight"] == (3, 16)


def test_widths_may_differ_by_layer():
    model = gemma3n(intermediate_size=[10, 30, 20])
    assert [tensors(model)[f"model.layers.{n}.mlp.up_proj.weight"][0] for n in range(3)] == [10, 30, 20]
    assert model.config.intermediate_size == 30


def test_a_token_beyond_the_table_of_embeddings_for_layers_has_its_first_row():
    (table,) = [each for each in weights_in(gemma3n().weights) if isinstance(each, Embedding) and each.is_partial]
    assert table == Embedding("model.embed_tokens_per_layer", 9, 12, is_partial=True)
    assert Lookup(table).rows_of(np.array([0, 8, 9, 10]), np.arange(4)).tolist() == [0, 8, 0, 0]
    whole = gemma3n(vocab_size_per_layer_input=11)
    assert not any(each.is_partial for each in weights_in(whole.weights) if isinstance(each, Embedding))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"intermediate_size": [8, 8]}, "intermediate_size"),
        ({"altup_active_idx": 4}, "altup_active_idx"),
        ({"altup_active_idx": -1}, "altup_active_idx"),
        ({"altup_num_inputs": 0}, "altup_num_inputs"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern"),
        ({"activation_sparsity_pattern": [0.5, 0.5, 1.0]}, "activation_sparsity_pattern"),
        ({"activation_sparsity_pattern": 0.5}, "activation_sparsity_pattern"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters"),
        ({"hidden_activation": "tanh"}, "hidden_activation"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        gemma3n(**said)


def test_defaults_are_the_configurations_own():
    model = build_model({"architectures": ["Gemma3nForConditionalGeneration"], "text_config": {}})
    assert (model.config.vocab_size, model.config.num_layers, model.context_length) == (262400, 35, 32768)
    assert len(model.state) == 20
    assert model.state[0] == KV(2, 256, 256, 512)
    assert tensors(model)["model.embed_tokens_per_layer.weight"] == (262144, 35 * 256)


def test_a_gguf_file_says_deviations_where_a_configuration_says_shares():
    deviations = [NormalDist().inv_cdf(0.95)] * 2 + [float("-inf")] * 4
    config = gguf_config("gemma3n", activation_sparsity_scale=deviations, **KV_HEADS | {"attention.sliding_window": 7})
    assert config["activation_sparsity_pattern"] == pytest.approx([0.95, 0.95, 0, 0, 0, 0])
    assert config["layer_types"] == [SLIDES] * 4 + [FULL, SLIDES]
    # Of six layers none would be left to share.
    assert config["num_kv_shared_layers"] == 0
    assert gguf_config("gemma3n", block_count=30, **KV_HEADS)["num_kv_shared_layers"] == 10
    assert "activation_sparsity_pattern" not in gguf_config("gemma3n", **KV_HEADS)


@pytest.mark.parametrize("wrong", [["a"] * 6, [0.5], [float("nan")] * 6], ids=str)
def test_deviations_that_make_no_sense_are_refused_by_name(wrong: list[Any]):
    with pytest.raises(CheckpointError, match="activation_sparsity_scale"):
        gguf_config("gemma3n", activation_sparsity_scale=wrong, **KV_HEADS)
