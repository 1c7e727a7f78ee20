"""Granite 4 and Bamba: kinds of layers, experts by option, positions, and what is refused."""

from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import KV, Experts, Linear, Recurrent, weights_in
from tests.models.arch.attentions import noted
from tests.models.arch.declared import build, gguf_config, tensors

SPACE = (Recurrent((3, 32 + 2 * 6)), Recurrent((4, 8, 6)))
FULL = KV(4, 4, 4)


def hybrid(**said: Any) -> Model:
    return build("GraniteMoeHybridForCausalLM", **said)


def bamba(**said: Any) -> Model:
    return build("BambaForCausalLM", **said)


def test_layers_are_of_the_kinds_that_are_named():
    assert hybrid(layer_types=["mamba", "attention", "mamba"]).state == (*SPACE, FULL, *SPACE)
    assert hybrid(layer_types=["linear_attention", "full_attention", "mamba"]).state == (*SPACE, FULL, *SPACE)
    assert hybrid(layer_types=None).state == SPACE * 3
    assert bamba(attn_layer_indices=[0, 2]).state == (FULL, *SPACE, FULL)
    assert bamba(attn_layer_indices=None).state == SPACE * 3


def test_experts_come_beside_the_shared_mlp_or_not_at_all():
    def experts(model: Model) -> list[int]:
        return [len(each.each) for each in weights_in(model.weights) if isinstance(each, Experts)]

    assert experts(hybrid()) == [2, 2, 2]
    dense = hybrid(num_local_experts=0)
    assert experts(dense) == []
    assert {name for name in tensors(dense) if "mlp" in name} == {
        f"model.layers.{n}.shared_mlp.{part}.weight"
        for n in range(3)
        for part in ("gate_proj", "up_proj", "output_linear")
    }


@pytest.mark.parametrize(("said", "turns"), [("rope", True), ("nope", False), (None, False)])
def test_there_are_positions_where_the_configuration_says_so(said: str | None, turns: bool):
    attending = {"layer_types": ["attention"] * 3, "num_local_experts": 0}
    specs = noted(hybrid(**attending, position_embedding_type=said, attention_multiplier=0.125)).attentions.values()
    assert {(spec.scale, spec.rope is not None) for spec in specs} == {(0.125, turns)}


def test_factors_of_one_are_left_out():
    attending = {"layer_types": ["attention"] * 3, "num_local_experts": 0}
    assert noted(hybrid(**attending)).factors == []
    assert noted(hybrid(**attending, residual_multiplier=0.5, embedding_multiplier=3.0)).factors == [3.0, *[0.5] * 6]


def test_bamba_turns_half_of_each_head_whatever_is_said():
    model = bamba(attn_layer_indices=[0, 1, 2], head_dim=8, partial_rotary_factor=1.0)
    assert {spec.rope.dims for spec in noted(model).attentions.values()} == {4}


def test_the_heads_width_is_derived_or_named():
    assert hybrid(mamba_d_head=8).state == hybrid().state
    named = hybrid(mamba_expand=3, mamba_n_heads=6, mamba_d_head=8)
    assert named.state[1] == Recurrent((6, 8, 6))
    into = next(each for each in weights_in(named.weights) if isinstance(each, Linear) and "mamba.in_proj" in each.name)
    assert into.outputs == 2 * 48 + 2 * 6 + 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["mamba"]}, "layer_types"),
        ({"layer_types": ["mamba", "mamba", "conv"]}, "layer_types"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ({"logits_scaling": 0}, "logits_scaling"),
        ({"mamba_d_head": 7}, "mamba_n_heads 4 x 7"),
        ({"mamba_d_head": "wide"}, "mamba_d_head"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        hybrid(**change)


SSM = {"ssm.time_step_rank": 8, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.conv_kernel": 4}
NAMES = [f"blk.{n}.{'attn_q' if n % 2 else 'ssm_in'}.weight" for n in range(6)]


def test_a_gguf_says_what_is_what():
    said = SSM | {"attention.head_count_kv": [0, 2] * 3, "rope.scaling.finetuned": False, "attention.scale": 0.25}
    config = gguf_config("granitehybrid", None, NAMES, **said, embedding_scale=3.0)
    assert config["layer_types"] == ["linear_attention", "full_attention"] * 3
    expected = {"num_local_experts": 0, "shared_intermediate_size": 96, "mamba_expand": 2, "num_key_value_heads": 2}
    expected |= {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "position_embedding_type": "nope"}
    assert {key: config[key] for key in expected} == expected
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_shared_feed_forward_length": 8}
    config = gguf_config("granitehybrid", None, NAMES, **said, **experts)
    assert (config["intermediate_size"], config["shared_intermediate_size"], config["num_local_experts"]) == (96, 8, 4)
