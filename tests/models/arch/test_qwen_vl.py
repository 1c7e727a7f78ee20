"""The text models of Qwens that see: axes, what pictures say deeper, and how files differ."""

from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from models.ops.rope import RopeConfig
from tests.models.arch.attentions import attentions, noted
from tests.models.arch.declared import GATED_DELTA, build, gguf_config, sizes, tensors, windows

FLAT, DEEP, MIXED = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
SECTIONS = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
TOWER = {"deepstack_visual_indexes": [5, 7]}
PUBLISHED = {"experts.gate_up_proj": (2, 16, 16), "experts.down_proj": (2, 8, 16)}
TURNED = {"experts.gate_up_proj": (2, 16, 16), "experts.down_proj": (2, 16, 8)}


def rope_of(model: Model) -> RopeConfig:
    rope = attentions(model)[-1].rope
    assert rope is not None
    return rope


def levels(model: Model) -> list[int]:
    return noted(model).deepened


@pytest.mark.parametrize("name", [FLAT, "Qwen2VLForConditionalGeneration"])
def test_a_qwen2_that_sees_is_a_qwen2_with_axes(name: str):
    said = {"head_dim": 8, "rope_theta": 500.0, "rms_norm_eps": 1e-6} | SECTIONS
    plain = build("Qwen2ForCausalLM", **said)
    assert build(name, **said).weights == plain.weights
    assert rope_of(build(name, **said)).axes == (0, 1, 2, 2)
    assert levels(build(name, vision_config=TOWER, **said)) == []


def test_a_qwen2_that_sees_has_defaults_of_its_own():
    model = build(FLAT, head_dim=8, **SECTIONS)
    assert rope_of(model).theta == 1_000_000.0
    assert model.context_length == 32768
    said = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 81, "head_dim": 8}
    assert windows(build(FLAT, **said, **SECTIONS)) == (None,) * 80 + (8,)
    assert rope_of(build(FLAT, head_dim=128, rope_scaling=None)).axes == (0,) * 16 + (1,) * 24 + (2,) * 24


def test_what_is_said_beside_the_tower_is_the_text_models():
    config = sizes(FLAT) | {"vision_config": {"hidden_size": 3}}
    model = build_model(config)
    assert model.config.hidden_size == 16
    assert {"visual.", "vision_tower."} <= set(model.other_parts)
    assert build(FLAT).other_parts == ()


@pytest.mark.parametrize("name", [DEEP, MIXED])
def test_pairs_turn_by_the_axes_in_turns_and_pictures_say_more_behind_the_first_layers(name: str):
    model = build(name, head_dim=8, rope_scaling={"mrope_section": [2, 1, 1]}, vision_config=TOWER)
    assert rope_of(model).axes == (0, 1, 2, 0)
    assert rope_of(model).theta == 500_000.0
    assert levels(model) == [1, 2]
    assert levels(build(name, head_dim=8)) == []


@pytest.mark.parametrize("name", [DEEP, MIXED])
def test_more_exits_than_layers_are_refused(name: str):
    with pytest.raises(CheckpointError, match="3 layers cannot take 4 deepstack levels"):
        build(name, vision_config={"deepstack_visual_indexes": [0, 1, 2, 3]})


@pytest.mark.parametrize("name", [DEEP, MIXED])
def test_another_towers_exits_than_the_decoder_takes_are_refused(name: str):
    with pytest.raises(CheckpointError, match="the decoder takes 1 deepstack levels, and its tower has 2"):
        build(name, deepstack_levels=1, vision_config={"deepstack_visual_indexes": [0, 1]})


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen3vlmoe"])
def test_a_gguf_file_with_the_tower_inside_may_say_the_exits_alone(arch: str):
    said = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    assert gguf_config(arch, **said)["deepstack_levels"] == 0
    assert gguf_config(arch, **said, **{"vision.deepstack_visual_indexes": [8, 16, 24]})["deepstack_levels"] == 3


def test_a_head_is_of_128_or_of_what_heads_share():
    assert attentions(build(DEEP))[0].head_dim == 128
    assert attentions(build(MIXED))[0].head_dim == 4


@pytest.mark.parametrize("architecture", ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_of_a_part_of_a_head_pairs_turn_by_the_axes_in_turns(architecture: str):
    said: dict[str, Any] = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_type": "default"}
    model = build(architecture, **GATED_DELTA | {"head_dim": 16}, full_attention_interval=1, rope_parameters=said)
    assert rope_of(model).axes == (0, 1, 2, 0)
    plain = build(architecture, **GATED_DELTA | {"head_dim": 64}, full_attention_interval=1)
    assert rope_of(plain).axes == (0, 1, 2, 0, 1, 2, 0, 1)


def test_a_qwen3_next_has_one_axis():
    assert rope_of(build("Qwen3NextForCausalLM", full_attention_interval=1)).axes == ()


@pytest.mark.parametrize(("shapes", "expected"), [(PUBLISHED, True), (TURNED, False), ({}, False)])
def test_where_the_models_width_lies_tells_how_experts_are_stored(shapes: dict[str, Any], expected: bool):
    places = {f"model.layers.0.mlp.{name}": shape for name, shape in shapes.items()}
    model = build_model(sizes(MIXED), lambda: places)
    first = next(stack for stack in model.stacks if "gate_up_proj" in stack.pattern)
    assert first.transposed is expected


@pytest.mark.parametrize("arch", ["qwen2vl", "qwen25vl"])
def test_a_gguf_file_says_its_sections(arch: str):
    config = gguf_config(arch, **{"rope.dimension_sections": [2, 3, 3, 0]})
    assert config["rope_scaling"] == {"mrope_section": [2, 3, 3]}
    assert gguf_config(arch, **{"rope.mrope_section": [3, 3, 2]})["rope_scaling"] == {"mrope_section": [3, 3, 2]}
    assert gguf_config(arch)["rope_scaling"] is None


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen3vlmoe"])
def test_a_gguf_file_says_behind_how_many_layers_pictures_say_more(arch: str):
    said = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    config = gguf_config(arch, **said, **{"rope.dimension_sections": [4, 2, 2, 0], "n_deepstack_layers": 3})
    assert (config["rope_scaling"], config["deepstack_levels"]) == ({"mrope_section": [4, 2, 2]}, 3)
    model = build_model(config | {"architectures": [DEEP if arch == "qwen3vl" else MIXED]})
    assert levels(model) == [1, 2, 3]
    assert rope_of(model).axes == (0, 1, 2, 0, 1, 2, 0, 0)


@pytest.mark.parametrize(("said", "width"), [({}, 4), ({"expert_feed_forward_length": 32}, 32)])
def test_the_width_of_experts_is_what_the_file_says_or_else_their_own(said: dict[str, int], width: int):
    named = ["blk.0.ffn_down_exps.weight"]
    config = gguf_config("qwen3vlmoe", named_tensors=named, expert_count=4, expert_used_count=2, **said)
    assert config["moe_intermediate_size"] == width


def test_a_yarn_is_kept_beside_the_sections():
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    config = gguf_config("qwen2vl", **scaling, **{"rope.dimension_sections": [2, 3, 3, 0]})
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}


def test_experts_weights_are_normalised_unless_something_else_is_said():
    routed = [layer.mlp.routing.normalized for layer in build(MIXED).weights.layers]
    assert routed == [True] * 3
    assert not build(MIXED, norm_topk_prob=False).weights.layers[0].mlp.routing.normalized
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in tensors(build(MIXED))
