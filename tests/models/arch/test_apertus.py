from typing import Any

import numpy as np
import pytest

from models.arch import Model, gguf_layout
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops.rope import Llama3Scaling
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, gguf_config, tensors


def apertus(**said: Any) -> Model:
    return build("ApertusForCausalLM", **said)


def rope(model: Model) -> Any:
    return attentions(model)[0].rope


def test_activations_have_two_numbers_with_an_axis_and_two_without():
    shapes = tensors(apertus())
    own = {name.rpartition(".")[2]: shape for name, shape in shapes.items() if "layers.1.mlp.act_fn." in name}
    assert own == {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
    assert not any("gate_proj" in name for name in shapes)


def test_a_configuration_without_a_rope_means_the_published_one():
    published = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    for said in ({}, {"rope_scaling": None, "rope_theta": 500.0}):
        assert (found := rope(apertus(**said))).scaling == published
        assert found.theta == 12_000_000.0
    own = rope(apertus(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=500.0))
    assert (own.theta, own.scaling.factor) == (500.0, 2.0)


def test_biases_are_the_attentions_and_by_option():
    assert biases(apertus(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}


@pytest.mark.parametrize(
    "said", [{"hidden_act": "silu"}, {"mlp_bias": True}, {"post_norm": True}, {"qk_norm": False}], ids=str
)
def test_what_no_published_model_has_is_refused_by_name(said: dict[str, Any]):
    with pytest.raises(CheckpointError, match=next(iter(said))):
        apertus(**said)


def numbers(**said: Any) -> Any:
    named = {"general.architecture": "apertus", "apertus.block_count": 2}
    metadata = GGUFMetadata(named | {f"xielu.{key}": value for key, value in said.items()}, {}, {}.get, "m.gguf")
    layout = gguf_layout(metadata)
    assert layout is not None
    return layout.numbers(metadata)


def test_a_gguf_file_has_the_numbers_among_its_metadata():
    found = numbers(alpha_p=[0.5, -1.5], alpha_n=[0.25, 0.75], beta=0.5, eps=[-1.0, -2.0])
    assert len(found) == 8
    assert found["model.layers.1.mlp.act_fn.alpha_p"] == np.array([-1.5], np.float32)
    assert [found[f"model.layers.{layer}.mlp.act_fn.beta"].shape for layer in (0, 1)] == [(), ()]


@pytest.mark.parametrize("wrong", [[0.5], ["a", "b"], [0.5, float("nan")], None, True], ids=str)
def test_numbers_that_make_no_sense_are_refused_by_name(wrong: Any):
    with pytest.raises(CheckpointError, match=r"xielu\.beta"):
        numbers(alpha_p=0.5, alpha_n=0.5, beta=wrong, eps=0.5)


def test_a_gguf_file_without_factors_has_no_scaling():
    config = gguf_config("apertus", **{"rope.freq_base": 500.0})
    assert (config["rope_parameters"], config["rope_theta"]) == ({"rope_type": "default"}, 500.0)
    config = gguf_config("apertus", {"rope_freqs.weight": [1.0, 2.0]})
    assert config["rope_parameters"] == {"rope_type": "factors", "factors": [1.0, 2.0]}
