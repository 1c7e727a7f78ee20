from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import biases, build, gguf_config


def granite(**said: Any) -> Model:
    return build("GraniteForCausalLM", **said)


def test_embeddings_and_branches_have_factors():
    said = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "num_hidden_layers": 2}
    assert noted(granite(**said)).factors == [12.0, *[0.22] * 4]
    assert set(noted(granite()).factors) == {1.0}


def test_the_scores_factor_is_the_configurations_and_no_heads_width():
    assert {spec.scale for spec in attentions(granite(attention_multiplier=0.015625))} == {0.015625}
    assert {spec.scale for spec in attentions(granite())} == {1.0}


def test_biases_are_by_option():
    assert biases(granite(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert biases(granite(mlp_bias=True)) == {f"mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_a_granite_may_have_no_positions():
    assert {spec.rope for spec in attentions(granite(position_embedding_type="nope"))} == {None}


def test_a_gguf_without_factors_scales_by_the_heads_width_as_llama_cpp_does():
    assert gguf_config("granite")["attention_multiplier"] == 0.25
    assert gguf_config("granite", **{"attention.scale": 0.5})["attention_multiplier"] == 0.5


@pytest.mark.parametrize(("said", "expected"), [(None, "rope"), (True, "rope"), (False, "nope")])
def test_a_gguf_says_by_its_scaling_that_there_are_no_positions(said: bool | None, expected: str):
    values = {} if said is None else {"rope.scaling.finetuned": said}
    assert gguf_config("granite", **values)["position_embedding_type"] == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ({"logits_scaling": 0}, "logits_scaling"),
        ({"residual_multiplier": "half"}, "residual_multiplier"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        granite(**change)
