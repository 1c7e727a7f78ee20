"""What projector files of the Qwens say, and which of it is refused."""

from collections.abc import Mapping

import pytest

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision import discover, family_of, projector_layout
from models.vision.gguf import Config, ProjectorLayout
from tests.models.vision.folders import Folder

SIZES = {
    "block_count": 4,
    "embedding_length": 8,
    "attention.head_count": 2,
    "patch_size": 4,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "v.blk.0.ffn_up.weight": (16, 8),
    "v.blk.0.ffn_down.weight": (8, 16),
    "v.position_embd.weight": (25, 8),
    "mm.2.weight": (12, 32),
}
FIRST, THIRD = "qwen2vl_merger", "qwen3vl_merger"
EXITS = {"v.deepstack.1.fc1.weight": (32, 32), "v.deepstack.3.fc1.weight": (32, 32)}


def file(kind: str, shapes: Mapping[str, tuple[int, ...]] | None = None, **said: object) -> GGUFMetadata:
    values: dict[str, object] = {"general.architecture": "clip", "clip.projector_type": kind}
    values |= {f"clip.vision.{key}": value for key, value in SIZES.items()}
    values |= {f"clip.{key}": value for key, value in said.items()}
    return GGUFMetadata(values, SHAPES | dict(shapes or {}), lambda _: None, "a.gguf")


def layout(kind: str, text: str = "") -> ProjectorLayout:
    found = projector_layout(file(kind), text)
    assert found is not None
    return found


def vision(metadata: GGUFMetadata, kind: str) -> Config:
    made = layout(kind).config(metadata, lambda _: None)["vision_config"]
    assert isinstance(made, dict)
    return made


@pytest.mark.parametrize("kind", [FIRST, THIRD])
@pytest.mark.parametrize(
    ("said", "activation"),
    [({}, "quick_gelu"), ({"use_gelu": True}, "gelu_pytorch_tanh"), ({"use_gelu": False, "use_silu": True}, "silu")],
)
def test_flags_say_the_activation(kind: str, said: dict[str, object], activation: str):
    assert vision(file(kind, **said), kind)["hidden_act"] == activation


@pytest.mark.parametrize("kind", [FIRST, THIRD])
def test_two_activations_are_refused(kind: str):
    with pytest.raises(CheckpointError, match=r"clip\.use_gelu and clip\.use_silu"):
        vision(file(kind, use_gelu=True, use_silu=True), kind)


@pytest.mark.parametrize("kind", [FIRST, THIRD])
@pytest.mark.parametrize("name", ["mm.2.weight", "v.blk.0.ffn_up.weight"])
def test_a_matrix_that_says_a_size_must_be_one(kind: str, name: str):
    with pytest.raises(CheckpointError, match="is missing or no matrix"):
        vision(file(kind, {name: (8,)}), kind)


@pytest.mark.parametrize("feed_forward_length", [0, 12, 16])
def test_how_wide_qwen2_vls_mlps_are_is_what_their_matrices_say(feed_forward_length: int):
    made = vision(file(FIRST, **{"vision.feed_forward_length": feed_forward_length}), FIRST)
    assert (made["mlp_ratio"], made["embed_dim"], made["hidden_size"]) == (2, 8, 12)


def test_windows_of_a_qwen2_vl_are_refused():
    assert vision(file(FIRST, **{"vision.n_wa_pattern": 0}), FIRST)["depth"] == 4
    with pytest.raises(CheckpointError, match=r"clip\.vision\.n_wa_pattern = 8 is not supported"):
        vision(file(FIRST, **{"vision.n_wa_pattern": 8}), FIRST)


def test_an_mlp_whose_width_no_ratio_says_is_refused():
    with pytest.raises(CheckpointError, match="an MLP of 20 is no multiple of the width 8"):
        vision(file(FIRST, {"v.blk.0.ffn_up.weight": (20, 8)}), FIRST)


def test_positions_that_are_no_square_are_refused():
    with pytest.raises(CheckpointError, match="24 positions are no square"):
        vision(file(THIRD, {"v.position_embd.weight": (24, 8)}), THIRD)


def test_rows_come_from_the_layers_that_have_tensors_for_it():
    assert vision(file(THIRD), THIRD)["deepstack_visual_indexes"] == []
    assert vision(file(THIRD, EXITS), THIRD)["deepstack_visual_indexes"] == [1, 3]
    flags = {"vision.is_deepstack_layers": [False, True, False, True]}
    assert vision(file(THIRD, EXITS, **flags), THIRD)["deepstack_visual_indexes"] == [1, 3]


@pytest.mark.parametrize("shapes", [{}, EXITS])
def test_flags_that_name_other_layers_are_refused(shapes: dict[str, tuple[int, ...]]):
    metadata = file(THIRD, shapes, **{"vision.is_deepstack_layers": [False, True, True, False]})
    with pytest.raises(CheckpointError, match=r"is_deepstack_layers for the layers \[1, 2\], and tensors for"):
        vision(metadata, THIRD)


def test_what_makes_rows_before_the_end_is_counted_from_its_layers():
    metadata, own = file(THIRD, EXITS), layout(THIRD)
    names = [own.hf_name(f"v.deepstack.{number}.fc1.weight", metadata) for number in (1, 3)]
    assert names == [f"visual.deepstack_merger_list.{number}.linear_fc1.weight" for number in (0, 1)]
    assert own.hf_name("v.blk.3.ffn_up.weight", metadata) == "visual.blocks.3.mlp.linear_fc1.weight"


def test_how_many_pixels_a_picture_has_is_what_a_file_says_or_the_published():
    said = {"vision.image_min_pixels": 5, "vision.image_max_pixels": 7}
    for kind, usual in ((FIRST, (3136, 12845056)), (THIRD, (65536, 16777216))):
        for metadata, wanted in ((file(kind), usual), (file(kind, **said), (5, 7))):
            rules = layout(kind).files(metadata)["preprocessor_config.json"]
            size = rules.get("size", {})
            assert isinstance(size, dict)
            found = (
                rules.get("min_pixels", size.get("shortest_edge")),
                rules.get("max_pixels", size.get("longest_edge")),
            )
            assert found == wanted


@pytest.mark.parametrize(
    ("text", "architecture"),
    [
        ("qwen3vl", "Qwen3VLForConditionalGeneration"),
        ("qwen3vlmoe", "Qwen3VLMoeForConditionalGeneration"),
        ("qwen35", "Qwen3_5ForConditionalGeneration"),
        ("qwen35moe", "Qwen3_5MoeForConditionalGeneration"),
    ],
)
def test_the_text_model_says_which_of_those_with_one_type_it_is(text: str, architecture: str):
    own = layout(THIRD, text)
    assert (own.hf, own.texts) == (architecture, (text,))
    assert any(architecture in family.hf and own in family.gguf for family in discover())


def test_a_projector_that_hears_too_is_not_known():
    assert projector_layout(file(THIRD, has_audio_encoder=False)) is not None
    assert projector_layout(file(THIRD, has_audio_encoder=True)) is None


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"])
def test_ollamas_one_file_is_known_for_experts_too(arch: str):
    values: dict[str, object] = {"general.architecture": arch, f"{arch}.vision.block_count": 2}
    found = projector_layout(GGUFMetadata(values, {}, lambda _: None, "a.gguf"))
    assert found is not None
    assert (found.types, found.texts) == ((), (arch,))


def test_an_activation_that_qwen3_vls_tower_has_not_is_refused():
    text = {
        "hidden_size": 12,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 30,
        "rope_scaling": {"mrope_section": [2, 1, 1]},
    }
    said = layout(THIRD).config(file(THIRD), lambda _: None)
    folder = Folder({"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": text} | said)
    family = family_of(folder)
    assert family is not None
    with pytest.raises(CheckpointError, match="hidden_act 'quick_gelu' is not supported"):
        family.build(folder, lambda _: [0])
