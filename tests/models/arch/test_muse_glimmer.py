from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import Norm, weights_in
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import build, gguf_config, tensors, windows

SLIDES, FULL = "sliding_attention", "full_attention"


def glimmer(**said: Any) -> Model:
    return build("MuseGlimmerForConditionalGeneration", **{"head_dim": 8, "rope_theta": 500.0} | said)


def test_every_fourth_layer_from_the_last_sees_everything_without_positions():
    model = glimmer(num_hidden_layers=6, sliding_window=7)
    assert windows(model) == (7, None, 7, 7, 7, None)
    assert [spec.rope is None for spec in attentions(model)] == [False, True, False, False, False, True]


def test_which_layers_have_positions_may_be_said_apart():
    model = glimmer(layer_types=[FULL, SLIDES, SLIDES], layer_rope_theta=[500.0, 0, 500.0], sliding_window=7)
    assert windows(model) == (None, 7, 7)
    assert [spec.rope is None for spec in attentions(model)] == [False, True, False]


def test_scores_are_scaled_by_a_factor_besides():
    assert attentions(glimmer(qk_scale_factor=2.0))[0].scale == pytest.approx(2 * 8**-0.5)


def test_norms_are_stored_less_one_but_the_last_and_three_have_no_weight():
    model = glimmer(num_hidden_layers=1, post_norm_eps=0.25)
    norms = [each for each in weights_in(model.weights) if isinstance(each, Norm) and each.name]
    ours = {each.name.rpartition(".")[2]: (each.offset, each.eps) for each in norms}
    assert ours["post_attention_layernorm"] == ours["post_feedforward_layernorm"] == (1.0, 0.25)
    assert ours["input_layernorm"] == ours["pre_feedforward_layernorm"] == (1.0, 1e-5)
    assert ours["norm"] == (0.0, 1e-5)
    assert noted(model).normed.count("") == 3


def test_a_head_may_be_the_embedding():
    assert "lm_head.weight" not in tensors(glimmer(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"normalize_tok_embeddings": True}, "normalize_tok_embeddings"),
        ({"output_soft_cap_temp": 20.0}, "output_soft_cap_temp"),
        ({"layer_rope_theta": [500.0, 0]}, "layer_rope_theta"),
        ({"layer_rope_theta": [500.0, 0, 50.0]}, "layer_rope_theta"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping"),
        ({"hidden_activation": "tanh"}, "hidden_activation"),
    ],
)
def test_what_makes_no_sense_or_is_not_supported_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        glimmer(**said)


def test_defaults_are_the_configurations_own():
    said = {"architectures": ["MuseGlimmerForConditionalGeneration"], "text_config": {"num_hidden_layers": 4}}
    model = build_model(said)
    assert (model.config.vocab_size, model.config.num_heads, model.context_length) == (202048, 32, 131072)
    assert windows(model) == (2048, 2048, 2048, None)
    assert "vision_tower." in model.other_parts


def test_a_gguf_file_has_whole_norms_and_those_of_queries_and_keys():
    own = {"attention.sliding_window": 7, "attention.key_length": 16, "logit_scale": 0.5, "rope.freq_base": 500.0}
    config = gguf_config("muse-glimmer", **own | {"attention.sliding_window_pattern": [True, False] * 3})
    assert config["layer_rope_theta"] == [500.0, 0.0] * 3
    assert config["layer_types"] == [SLIDES, FULL] * 3
    said = {"architectures": ["MuseGlimmerForConditionalGeneration"], "gguf_architecture": "muse-glimmer"}
    model = build_model(config | said)
    assert tensors(model)["model.layers.0.self_attn.q_norm.weight"] == (16,)
    assert attentions(model)[0].scale == 16**-0.5
    assert {each.offset for each in weights_in(model.weights) if isinstance(each, Norm)} == {0.0}
