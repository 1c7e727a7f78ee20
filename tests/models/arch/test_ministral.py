from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import PositionScale, RopeConfig
from models.ops.rope import YarnScaling
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import build, gguf_config, windows


def ministral3(**said: Any) -> Model:
    return build("Ministral3ForCausalLM", model_type="ministral3", **said)


def ministral(**said: Any) -> Model:
    return build("MinistralForCausalLM", model_type="ministral", **said)


def test_queries_grow_with_their_position_by_the_ropes_settings():
    settings = {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.3}
    model = ministral3(rope_parameters=settings | {"original_max_position_embeddings": 64})
    assert noted(model).position_scales == [PositionScale(0.3, 64)] * 3
    assert noted(ministral()).position_scales == []


def test_the_period_of_the_growth_is_needed():
    with pytest.raises(CheckpointError, match="original_max_position_embeddings is missing"):
        ministral3(rope_parameters={"rope_type": "default", "llama_4_scaling_beta": 0.3})


def test_a_ministral_3_that_says_nothing_of_its_rope_has_yarn_without_a_temperature():
    model = ministral3()
    assert {spec.rope for spec in attentions(model)} == {
        RopeConfig(4, 1_000_000.0, YarnScaling(16.0, 16384, 32.0, 1.0, 1.0, truncate=True))
    }
    assert noted(model).position_scales == [PositionScale(0.1, 16384)] * 3
    assert model.context_length == 262144


def test_windows_are_by_layer_types_or_everywhere():
    assert windows(ministral()) == (4096,) * 3
    assert windows(ministral(sliding_window=None)) == (None,) * 3
    assert windows(ministral3()) == (None,) * 3
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(ministral(sliding_window=8, layer_types=kinds)) == (8, None, 8)


def test_a_text_model_of_another_type_is_refused():
    with pytest.raises(CheckpointError, match="a text model of type 'mistral4' is not supported"):
        build("Mistral3ForConditionalGeneration", text_config={"model_type": "mistral4"})


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    "keys",
    [
        ("yarn_log_multiplier", "yarn_beta_fast", "yarn_beta_slow", "attention.temperature_scale"),
        ("mscale_all_dim", "beta_fast", "beta_slow", "rope.scaling_beta"),
    ],
)
def test_the_rope_of_a_gguf_is_said_in_llama_cpps_keys_or_in_ollamas(keys: tuple[str, str, str, str]):
    *scaling, growth = keys
    said = {f"rope.scaling.{key}": value for key, value in zip(scaling, (2.0, 16.0, 0.5), strict=True)}
    assert gguf_config("mistral3", **YARN, **said, **{growth: 0.25})["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 2.0,
        "beta_fast": 16.0,
        "beta_slow": 0.5,
        "llama_4_scaling_beta": 0.25,
        "rope_theta": 10000.0,
    }


def test_a_gguf_without_scaling_has_none():
    assert gguf_config("mistral3")["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0, "mscale": 1.0}


def test_a_growth_with_a_period_of_its_own_is_refused():
    assert gguf_config("mistral3", **YARN, **{"attention.temperature_length": 32})
    with pytest.raises(CheckpointError, match=r"attention\.temperature_length 64 is not supported"):
        gguf_config("mistral3", **YARN, **{"attention.temperature_length": 64})
