from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import RopeConfig
from models.ops.rope import LongScaling
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, gguf_config, tensors, windows

FACTORS = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}


def phi3(**said: Any) -> Model:
    return build("Phi3ForCausalLM", **said)


def test_queries_keys_and_values_are_one_matrix_and_gate_and_up_another():
    found = tensors(phi3(num_key_value_heads=2))
    layer = "model.layers.1"
    assert found[f"{layer}.self_attn.qkv_proj.weight"] == (16 + 8 + 8, 16)
    assert found[f"{layer}.mlp.gate_up_proj.weight"] == (2 * 24, 16)
    assert not [name for name in found if "q_proj" in name or "up_proj" in name.replace("gate_up_proj", "")]
    assert biases(phi3()) == set()


@pytest.mark.parametrize(("window", "expected"), [(8, 8), (None, None)])
def test_a_window_is_every_layers(window: int | None, expected: int | None):
    assert windows(phi3(sliding_window=window)) == (expected,) * 3


@pytest.mark.parametrize(
    "named", [{"type": "longrope"}, {"rope_type": "longrope"}, {"type": "su"}, {"type": "yarn"}, {"rope_type": "yarn"}]
)
def test_longrope_goes_by_several_names(named: dict[str, str]):
    said = {"rope_scaling": {**named, **FACTORS}, "max_position_embeddings": 16384}
    (rope,) = {spec.rope for spec in attentions(phi3(**said))}
    # The square root of 1 + log(16384 / 4096) / log(4096).
    assert rope == RopeConfig(4, 10000.0, LongScaling((1.0, 2.0), (3.0, 4.0), 4096, pytest.approx((7 / 6) ** 0.5)))


def test_a_quarter_of_a_head_may_stay_as_it_is():
    assert attentions(phi3(head_dim=8, partial_rotary_factor=0.75))[0].rope == RopeConfig(6, 10000.0)


def test_as_many_factors_as_pairs_turn_are_needed():
    with pytest.raises(CheckpointError, match="2 rope factors for a head of 6 dimensions"):
        phi3(head_dim=8, partial_rotary_factor=0.75, rope_scaling={"type": "longrope", **FACTORS})


def test_a_ggufs_factors_are_tensors():
    vectors = {"rope_factors_short.weight": [1.0, 2.0], "rope_factors_long.weight": [3.0, 4.0]}
    said = gguf_config("phi3", vectors, **{"rope.scaling.original_context_length": 32})
    assert said["original_max_position_embeddings"] == 32
    assert said["rope_scaling"] == {"rope_type": "longrope", "attention_factor": None, **FACTORS}
