"""Qwen3-Next and Qwen3.5: which layers are which, what tensors tell, and what is refused."""

import re
from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops import KV, Experts, Norm, Recurrent, weights_in
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import GATED_DELTA, build, gguf_config, sizes, tensors

CONV, DELTA, FULL = Recurrent((3, 64)), Recurrent((4, 10, 6)), KV(4, 8, 8)
LINEAR = "model.layers.0.linear_attn"
KINDS = ["linear_attention", "full_attention"]
RAW, MOVED, FLAT = (64, 1, 4), (64, 4, 1), (64, 4)


def qwen(**said: Any) -> Model:
    return build("Qwen3_5ForCausalLM", **said)


def told(conv: tuple[int, ...], *names: str, architecture: str = "Qwen3_5ForCausalLM") -> Model:
    """The model where a checkpoint has a kernel of that shape and tensors of these names."""
    shapes = {f"language_model.{LINEAR}.conv1d.weight": conv} | dict.fromkeys(names, (4, 4))
    return build_model(sizes(architecture) | {"full_attention_interval": 2}, lambda: shapes)


def offsets(model: Model) -> dict[str, float]:
    """What is added to each norm, by what it is called within a layer."""
    norms = (weight for weight in weights_in(model.weights) if isinstance(weight, Norm))
    return {re.sub(r"model\.(layers\.\d+\.)?", "", norm.name): norm.offset for norm in norms}


def inputs(model: Model) -> set[str]:
    start = f"{LINEAR}.in_proj_"
    return {name.removeprefix(start).removesuffix(".weight") for name in tensors(model) if name.startswith(start)}


def test_layers_attend_by_their_kinds_and_else_by_their_interval():
    assert qwen(num_hidden_layers=4).state == (CONV, DELTA) * 3 + (FULL,)
    assert qwen(full_attention_interval=2).state == (CONV, DELTA, FULL, CONV, DELTA)
    assert qwen(full_attention_interval=2, layer_types=[*KINDS[::-1], KINDS[1]]).state == (FULL, CONV, DELTA, FULL)


def test_a_quarter_of_a_head_turns_unless_something_else_is_said_at_either_place():
    def turning(**said: Any) -> int:
        (spec,) = attentions(qwen(full_attention_interval=1, num_hidden_layers=1, **said))
        assert spec.rope is not None
        return spec.rope.dims

    assert turning() == 2
    assert turning(partial_rotary_factor=0.5) == 4
    assert turning(rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0}) == 8


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_axes_of_positions_are_all_the_same_in_a_text(key: str):
    sections = {"mrope_section": [1, 0, 0], "rope_theta": 500.0}
    assert qwen(rope_scaling={key: "mrope"} | sections).weights == qwen().weights
    with pytest.raises(CheckpointError, match="'other' is not supported"):
        qwen(rope_scaling={key: "other"} | sections)


def test_queries_have_gates_behind_them_and_projections_biases_by_option():
    found = tensors(qwen(layer_types=KINDS, num_hidden_layers=2, attention_bias=True))
    place = "model.layers.1.self_attn"
    assert found[f"{place}.q_proj.weight"] == (2 * 4 * 8, 16)
    assert found[f"{place}.k_proj.weight"] == found[f"{place}.v_proj.weight"] == (4 * 8, 16)
    biases = {name.removeprefix(f"{place}.") for name in found if name.endswith("_proj.bias")}
    assert biases == {f"{part}_proj.bias" for part in "qkvo"}


def test_inputs_lie_in_two_matrices_in_the_first_of_them_and_in_four_in_the_others():
    assert inputs(build("Qwen3NextForCausalLM")) == {"qkvz", "ba"}
    assert inputs(qwen()) == inputs(build("Qwen3_5MoeForCausalLM")) == {"qkv", "z", "b", "a"}


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
@pytest.mark.parametrize(
    "parts", [("qkvz", "ba"), ("qkv", "z", "b", "a"), ("qkv", "z", "ba"), ("qkvz", "b", "a")], ids="-".join
)
def test_tensors_tell_in_how_many_matrices_inputs_lie(architecture: str, parts: tuple[str, ...]):
    names = [f"{LINEAR}.in_proj_{part}.weight" for part in parts]
    assert inputs(told(RAW, *names, architecture=architecture)) == set(parts)


@pytest.mark.parametrize(
    ("conv", "names", "offset"),
    [
        (RAW, [], 1.0),
        (MOVED, [], 0.0),
        # Some converters keep what predicts further tokens, and shift its norms too.
        (MOVED, ["mtp.fc.weight"], 0.0),
        (RAW, ["mtp.fc.weight"], 1.0),
        (FLAT, ["mtp.fc.weight"], 1.0),
        (FLAT, [], 0.0),
    ],
)
def test_tensors_tell_whether_1_was_added_to_norms(conv: tuple[int, ...], names: list[str], offset: float):
    found = offsets(told(conv, *names))
    assert found.pop("linear_attn.norm") == 0.0
    assert set(found.values()) == {offset}
    assert set(found) == {
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{part}_norm" for part in "qk"),
        "norm",
    }


def test_what_a_config_says_goes_before_what_tensors_tell():
    model = build_model(sizes("Qwen3_5ForCausalLM") | {"norm_offset": 0.0}, lambda: {f"{LINEAR}.conv1d.weight": RAW})
    assert set(offsets(model).values()) == {0.0}


def test_mixtures_are_where_the_config_says_and_weigh_all_that_is_picked():
    def routings(architecture: str, **said: Any) -> list[bool]:
        model = build(architecture, **said)
        return [layer.mlp.routing.normalized for layer in model.weights.layers if hasattr(layer.mlp, "routing")]

    assert routings("Qwen3NextForCausalLM") == [True] * 3
    assert routings("Qwen3_5MoeForCausalLM", norm_topk_prob=False) == [False] * 3
    assert routings("Qwen3NextForCausalLM", mlp_only_layers=[1], decoder_sparse_step=2) == []
    assert not [each for each in weights_in(qwen().weights) if isinstance(each, Experts)]


def test_no_width_is_asked_for_where_no_layer_is_dense():
    said = {"intermediate_size": None, "shared_expert_intermediate_size": 12}
    assert build("Qwen3_5MoeForCausalLM", **said).config.intermediate_size == 12
    with pytest.raises(CheckpointError, match="intermediate_size is missing"):
        qwen(intermediate_size=None)


def test_of_a_multimodal_model_the_tower_and_what_predicts_further_tokens_are_left_out():
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": sizes("Qwen3_5ForCausalLM")}
    assert build_model(config).other_parts == ("mtp.", "visual.", "vision_tower.")
    assert qwen().other_parts == ("mtp.",)


def gguf(arch: str, **said: Any) -> dict[str, Any]:
    names = [f"blk.{n}.{'attn_q.weight' if n in (1, 5) else 'ssm_a'}" for n in range(6)]
    sizes = {"ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2, "ssm.time_step_rank": 4}
    sizes |= {"ssm.inner_size": 40, "attention.head_count_kv": 2}
    return gguf_config(arch, None, names, **sizes | said)


def test_a_gguf_says_by_tensors_which_layers_attend_and_how_large_heads_are():
    config = gguf("qwen35", **{"attention.head_count_kv": [0, 2, 0, 0, 0, 2], "rope.dimension_count": 4})
    assert config["layer_types"] == [KINDS[n in (1, 5)] for n in range(6)]
    assert (config["num_key_value_heads"], config["partial_rotary_factor"]) == (2, 0.25)
    assert {key: config[key] for key in GATED_DELTA if key != "head_dim"} == {
        key: value for key, value in GATED_DELTA.items() if key != "head_dim"
    }
    assert config["linear_conv_kernel_dim"] == 3
    assert gguf("qwen35")["partial_rotary_factor"] == 1.0


def test_a_ggufs_last_layers_may_predict_further_tokens():
    config = gguf("qwen35", nextn_predict_layers=1)
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (5, 5)
    model = qwen(**GATED_DELTA, num_hidden_layers=5, num_nextn_predict_layers=1)
    assert model.other_parts == ("mtp.", "layers.5.", "blk.5.")


def test_heads_of_values_take_turns_in_the_newer_ggufs_unless_they_say_otherwise():
    assert gguf("qwen35")["tiled_value_heads"]
    assert gguf("qwen35moe", **{"ssm.v_head_reordered": True})["tiled_value_heads"]
    assert not gguf("qwen35", **{"ssm.v_head_reordered": False})["tiled_value_heads"]
    assert not gguf("qwen3next")["tiled_value_heads"]


def test_a_gguf_of_mixtures_alone_may_have_no_width():
    counts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8}
    config = gguf("qwen35moe", **counts, feed_forward_length=0, expert_shared_feed_forward_length=12)
    assert (config["intermediate_size"], config["moe_intermediate_size"]) == (8, 8)
    assert (config["shared_expert_intermediate_size"], config["norm_topk_prob"]) == (12, True)
    assert not gguf("qwen35moe", **counts, expert_shared_feed_forward_length=8, norm_top_k_prob=False)["norm_topk_prob"]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"ssm.inner_size": 42}, "4 heads for values of 42"),
        ({"ssm.conv_kernel": 0}, r"qwen35\.ssm\.conv_kernel"),
    ],
)
def test_what_a_gguf_cannot_mean_is_refused_by_name(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        gguf("qwen35", **said)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_output_gate": False}, "attn_output_gate false"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid'"),
        ({"layer_types": KINDS}, "layer_types"),
        ({"layer_types": ["linear_attention", "full_attention", "sliding_attention"]}, "layer_types"),
        ({"full_attention_interval": 0}, "full_attention_interval"),
        ({"linear_num_key_heads": 3}, "4 heads of values cannot share 3 heads of keys"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        qwen(**change)
