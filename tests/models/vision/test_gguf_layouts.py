"""How families say that GGUF files hold their towers, against the names that the format's own library has."""

import gguf
import pytest

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision import discover, projector_layout
from models.vision.gguf import ProjectorLayout, projector_type

LAYOUTS = [layout for family in discover() for layout in family.gguf]
OF_FILES = [layout for layout in LAYOUTS if layout.types]
LEGACY = ("mm.0", "mm.2")
"""LLaVA's, which an older converter names."""
OTHERWISE = {
    "visual.merger.norm": (gguf.MODEL_TENSOR.V_POST_NORM, 0),
    "visual.merger.linear_fc1": (gguf.MODEL_TENSOR.V_MMPROJ, 0),
    "visual.merger.linear_fc2": (gguf.MODEL_TENSOR.V_MMPROJ, 2),
    "visual.deepstack_merger_list.1.norm": (gguf.MODEL_TENSOR.V_DS_NORM, 1),
    "visual.deepstack_merger_list.1.linear_fc1": (gguf.MODEL_TENSOR.V_DS_FC1, 1),
    "visual.deepstack_merger_list.1.linear_fc2": (gguf.MODEL_TENSOR.V_DS_FC2, 1),
}
"""Qwen3-VL's, whose converter names these without the library's table."""


def metadata(values: dict[str, object], shapes: dict[str, tuple[int, ...]] | None = None) -> GGUFMetadata:
    return GGUFMetadata({"general.architecture": "clip", **values}, shapes or {}, lambda _: None, "a.gguf")


def named(layout: ProjectorLayout) -> list[tuple[str, str]]:
    pairs = [(gguf_name, name) for gguf_name, name in layout.names.items()]
    if "mlp" in layout.types:
        pairs = [(gguf_name, name) for gguf_name, name in pairs if gguf_name not in LEGACY]
    # The converter divides these before it names them.
    apart = {".attn.qkv.": [f".attn.{part}." for part in "qkv"]}
    for made in layout.made:
        for key, parts in apart.items():
            if key in made.name:
                pairs += [(piece, made.name.replace(key, part)) for piece, part in zip(made.pieces, parts, strict=True)]
    return pairs


@pytest.mark.parametrize("layout", OF_FILES, ids=lambda layout: f"{layout.types[0]}-{layout.hf}")
def test_a_projectors_names_are_those_of_the_formats_library(layout: ProjectorLayout):
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    for own, name in named(layout):
        # The only matrix whose name says so otherwise; the converter puts that right first.
        asked = name.replace("_projection_weight", "_projection.weight").replace("{n}", "1")
        if asked in OTHERWISE:
            kind, number = OTHERWISE[asked]
            assert gguf.TENSOR_NAMES[kind].format(bid=number) == own.replace("{n}", "1")
            continue
        assert known.get_name(asked, try_suffixes=(".weight", ".bias")) == own.replace("{n}", "1"), name


def test_every_type_is_one_that_the_format_knows():
    known = {*vars(gguf.VisionProjectorType).values(), "mlp"}
    assert {kind for layout in OF_FILES for kind in layout.types} <= known


def test_a_file_without_a_type_is_an_mlps():
    assert projector_type(metadata({})) == "mlp"
    assert projector_type(metadata({"clip.vision.projector_type": "gemma3"})) == "gemma3"
    assert projector_type(metadata({"clip.projector_type": "pixtral", "clip.vision.projector_type": "x"})) == "pixtral"


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"clip.vision.image_grid_pinpoints": [336, 672]}, {}),
        ({"clip.vision.mm_patch_merge_type": "spatial_unpad"}, {}),
        ({}, {"model.image_newline": (8,)}),
        ({}, {"mm.3.weight": (8, 8)}),
    ],
)
def test_other_llavas_than_the_plain_one_are_not_known(values: dict[str, object], shapes: dict[str, tuple[int, ...]]):
    plain = {"v.class_embd": (8,), "mm.0.weight": (8, 8), "mm.2.weight": (8, 8)}
    assert projector_layout(metadata({}, plain)) is not None
    assert projector_layout(metadata(values, plain | shapes)) is None


def test_the_matrices_of_an_mlp_may_have_each_others_names():
    layout = next(each for each in OF_FILES if "mlp" in each.types)
    values = {"clip.vision.embedding_length": 8}
    for down, up, shape in (("fc2", "fc1", (8, 16)), ("fc1", "fc2", (16, 8))):
        file = metadata(values, {"v.blk.0.ffn_down.weight": shape})
        assert layout.hf_name("v.blk.3.ffn_down.bias", file) == (
            f"vision_tower.vision_model.encoder.layers.3.mlp.{down}.bias"
        )
        assert layout.hf_name("v.blk.3.ffn_up.weight", file) == (
            f"vision_tower.vision_model.encoder.layers.3.mlp.{up}.weight"
        )


def test_features_are_of_the_layers_that_a_file_names():
    layout = next(each for each in OF_FILES if "mlp" in each.types)
    dims = {
        "embedding_length": 8,
        "feed_forward_length": 16,
        "block_count": 3,
        "attention.head_count": 2,
        "patch_size": 4,
        "image_size": 8,
    }
    values: dict[str, object] = {f"clip.vision.{key}": value for key, value in dims.items()}
    assert layout.config(metadata(values), lambda _: None)["vision_feature_layer"] == -1
    values["clip.vision.feature_layer"] = [1, 3]
    assert layout.config(metadata(values), lambda _: None)["vision_feature_layer"] == [1, 3]
    values["clip.vision.feature_layer"] = "all"
    with pytest.raises(CheckpointError, match=r"clip\.vision\.feature_layer = 'all', which makes no sense"):
        layout.config(metadata(values), lambda _: None)
