from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import RopeConfig
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, tensors, windows


def cohere(**said: Any) -> Model:
    return build("CohereForCausalLM", **said)


def cohere2(**said: Any) -> Model:
    return build("Cohere2ForCausalLM", **said)


def test_a_layer_has_one_norm_without_bias():
    model = cohere2(num_hidden_layers=1)
    assert noted(model).normed == ["model.layers.0.input_layernorm", "model.norm"]
    assert [name for name in tensors(model) if "norm" in name] == [
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ]


def test_layers_of_a_cohere_2_have_a_window_or_no_positions():
    specs = attentions(cohere2(num_hidden_layers=8, sliding_window=8))
    assert [spec.window for spec in specs] == [8, 8, 8, None] * 2
    assert [spec.rope for spec in specs] == [*[RopeConfig(4, 10000.0, interleaved=True)] * 3, None] * 2
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert [spec.rope is None for spec in attentions(cohere2(layer_types=kinds))] == [True, False, True]


def test_every_layer_of_a_cohere_sees_everything_and_has_positions():
    assert windows(cohere(num_hidden_layers=4, sliding_window=8)) == (None,) * 4
    assert {spec.rope for spec in attentions(cohere())} == {RopeConfig(4, 500_000.0, interleaved=True)}


def test_the_limit_of_a_command_r_is_not_the_positions_that_it_names():
    assert cohere(max_position_embeddings=8192).context_length == 8192
    assert cohere(max_position_embeddings=8192, model_max_length=131072).context_length == 131072


def test_biases_are_the_attentions_and_by_option():
    assert biases(cohere2(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_qk_norm": True}, "use_qk_norm True is not supported"),
        ({"use_parallel_block": False}, "use_parallel_block False is not supported"),
        ({"use_gated_activation": False}, "use_gated_activation False is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct 0.5 is not supported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ({"logit_scale": "big"}, "logit_scale"),
        ({"sliding_window": 0}, "sliding_window"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        cohere2(**change)
