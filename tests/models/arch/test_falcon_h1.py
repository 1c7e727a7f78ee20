"""Falcon-H1: both kinds of layers side by side, factors that are in the weights or not, and what is refused."""

from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import KV, Recurrent
from tests.models.arch.declared import build, gguf_config, tensors

QUANTIZED = {"quantization": {"group_size": 64, "bits": 4}}


def falcon(**said: Any) -> Model:
    return build("FalconH1ForCausalLM", **said)


def mixer(model: Model) -> Any:
    return model.weights.layers[0].mixer


def test_a_layer_remembers_a_state_space_and_keys():
    assert falcon().state == (Recurrent((3, 40 + 2 * 6)), Recurrent((4, 10, 6)), KV(4, 4, 4)) * 3


def test_the_width_within_is_named_or_derived():
    assert tensors(falcon(mamba_d_ssm=None))["model.layers.0.mamba.out_proj.weight"] == (16, 32)
    assert tensors(falcon(mamba_d_ssm=64))["model.layers.0.mamba.out_proj.weight"] == (16, 64)


def test_the_norm_is_by_option_and_before_the_gate_unless_said_otherwise():
    assert "model.layers.0.mamba.norm.weight" not in tensors(falcon())
    assert tensors(falcon(mamba_rms_norm=True))["model.layers.0.mamba.norm.weight"] == (40,)
    assert mixer(falcon(mamba_rms_norm=True)).gated_last
    assert not mixer(falcon(mamba_rms_norm=True, mamba_norm_before_gate=False)).gated_last


def test_biases_are_by_four_options():
    flags = {"attention_bias": "self_attn.q_proj", "mlp_bias": "feed_forward.down_proj"}
    flags |= {"mamba_proj_bias": "mamba.in_proj", "projectors_bias": "mamba.out_proj"}
    for flag, name in flags.items():
        found = {key for key in tensors(falcon(**{flag: True})) if key.endswith(".bias")}
        assert {other for other in flags.values() if f"model.layers.0.{other}.bias" in found} == {name}


def test_factors_within_are_left_out_where_all_are_one():
    assert mixer(falcon()).factors == ()
    assert mixer(falcon(ssm_multipliers=[1, 2, 3, 4, 5])).factors == (1.0, 2.0, 3.0, 4.0, 5.0)


def test_the_kernels_axes_tell_folded_weights_from_others():
    assert mixer(falcon()).conv.exact
    assert not mixer(falcon(**QUANTIZED)).conv.exact
    assert not mixer(falcon(gguf_architecture="falcon-h1")).conv.exact


def test_factors_that_a_converter_folded_are_not_applied_again():
    folded = falcon(**QUANTIZED, ssm_multipliers=[1, 2, 3, 4, 5], key_multiplier=0.5)
    assert mixer(folded).factors == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ({"mlp_multipliers": [1.0]}, "mlp_multipliers"),
        ({"mlp_multipliers": [1.0, 1.0, 1.0]}, "mlp_multipliers"),
        ({"mamba_d_ssm": 42}, "is not the width 42"),
        ({"key_multiplier": "half"}, "key_multiplier"),
        ({"attention_in_multiplier": 2.0, **QUANTIZED}, "attention_in_multiplier"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        falcon(**change)


def test_a_gguf_gates_first_and_has_its_factors_in_the_weights():
    said = {"ssm.time_step_rank": 8, "ssm.inner_size": 96, "ssm.state_size": 16, "ssm.conv_kernel": 4}
    config = gguf_config("falcon-h1", None, ["blk.0.ssm_norm.weight"], **said)
    assert (config["mamba_d_ssm"], config["mamba_rms_norm"], config["mamba_norm_before_gate"]) == (96, True, False)
    assert not [key for key in config if "multiplier" in key]
    assert not gguf_config("falcon-h1", **said)["mamba_rms_norm"]
