"""Mamba-2 and what its layers share: sizes, states, limits of time steps, and what is refused."""

from typing import Any

import pytest

from models.arch import Model
from models.arch.recurrent import read_limits
from models.config_reader import JSON
from models.errors import CheckpointError
from models.ops import Recurrent, StateSpace
from models.sources.base import TensorInfo
from models.weights.stacks import separate_infos
from tests.models.arch.declared import build, gguf_config, tensors

LIMITLESS = (0.0, float("inf"))
CONVOLVED, SPACE = Recurrent((3, 32 + 2 * 2 * 6)), Recurrent((4, 8, 6))


def mamba2(**said: Any) -> Model:
    return build("Mamba2ForCausalLM", **said)


def space(model: Model) -> StateSpace:
    return model.weights.layers[0].mixer.space


def test_a_layer_remembers_its_convolutions_inputs_and_the_spaces_state():
    model = mamba2()
    assert model.state == (CONVOLVED, SPACE) * 3
    assert model.prefix == "backbone."


def test_without_positions_the_context_is_a_large_one_unless_the_configuration_names_it():
    assert mamba2().context_length == 1 << 20
    assert mamba2(max_position_embeddings=2048).context_length == 2048


def test_a_layers_tensors_are_the_published_ones():
    found = tensors(mamba2(use_bias=True))
    name = "backbone.layers.2.mixer"
    assert {key.removeprefix(f"{name}."): shape for key, shape in found.items() if key.startswith(name)} == {
        "in_proj.weight": (2 * 32 + 2 * 2 * 6 + 4, 16),
        "in_proj.bias": (2 * 32 + 2 * 2 * 6 + 4,),
        "conv1d.weight": (32 + 2 * 2 * 6, 1, 4),
        "conv1d.bias": (32 + 2 * 2 * 6,),
        "A_log": (4,),
        "dt_bias": (4,),
        "D": (4,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
        "out_proj.bias": (16,),
    }
    assert not [key for key in tensors(mamba2(use_conv_bias=False)) if key.endswith(".bias")]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, LIMITLESS),
        ([0.0, float("inf")], LIMITLESS),
        ([0.001, {"__float__": "Infinity"}], (0.001, float("inf"))),
        ([0.1, 2], (0.1, 2.0)),
    ],
)
def test_the_limits_of_time_steps_may_be_infinite(said: JSON, expected: tuple[float, float]):
    assert read_limits({"time_step_limit": said}) == expected
    own = space(mamba2(time_step_limit=said))
    assert (own.least_dt, own.most_dt) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time_step_limit": [0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit"),
        ({"time_step_limit": [-1.0, 0.1]}, "time_step_limit"),
        ({"time_step_limit": 0.1}, "time_step_limit"),
        ({"time_step_limit": [0.1, {"__float__": "NaN"}]}, "time_step_limit"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"n_groups": 3}, "4 heads of a state space do not divide into 3 groups"),
        ({"expand": 3}, "num_heads 4 x head_dim 8"),
        ({"conv_kernel": 0}, "conv_kernel"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        mamba2(**change)


SSM = {"ssm.time_step_rank": 8, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.conv_kernel": 3}


def test_a_gguf_says_what_its_layers_are_like():
    config = gguf_config("mamba2", None, ["blk.0.ssm_conv1d.bias"], **SSM | {"attention.head_count": 0})
    expected = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "conv_kernel": 3, "expand": 2}
    assert {key: config[key] for key in expected} == expected
    assert (config["use_bias"], config["use_conv_bias"], config["tie_word_embeddings"]) == (False, True, True)
    with pytest.raises(CheckpointError, match="8 heads for a state space of 100"):
        gguf_config("mamba2", **SSM | {"ssm.inner_size": 100})


def test_the_embeddings_older_name_is_understood():
    name = "backbone.embedding.weight"
    info = TensorInfo(name, (11, 16), 704, quantized=False, file="w.safetensors", kind="F32")
    assert [each.name for each in separate_infos([info], mamba2().stacks)] == ["backbone.embeddings.weight"]
