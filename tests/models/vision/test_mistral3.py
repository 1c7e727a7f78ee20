from collections.abc import Mapping
from typing import Any

import pytest

from models.errors import CheckpointError
from models.ops import weights_in
from models.sources.base import TensorInfo
from models.vision import PLACE, Vision
from models.vision.mistral3 import FAMILY
from models.weights.stacks import separate_infos
from tests.models.vision.folders import Folder, blank

TEXT = {
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 4}
TOKENS = {"[IMG_BREAK]": [12], "[IMG_END]": [13]}


def mistral3(
    vision: Mapping[str, Any] | None = None, files: Mapping[str, Mapping[str, Any]] | None = None, **said: Any
) -> Vision:
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": TEXT,
        "vision_config": VISION | dict(vision or {}),
        **said,
    }
    usual = {"preprocessor_config.json": {"size": {"longest_edge": 32}}}
    return FAMILY.build(Folder(config, {**usual, **(files or {})}), lambda text: TOKENS.get(text, []))


def test_rows_of_places_end_in_a_token_and_the_last_in_another():
    prepared = mistral3().prepare(blank(20, 9))
    row = (PLACE, PLACE)
    assert prepared.expansion == (*row, 12, *row, 12, *row, 13)
    assert prepared.patches == 24
    assert len(prepared.passes) == 1


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(1, 1, 1, 1), (32, 32, 4, 4), (33, 32, 4, 4), (33, 10, 4, 2), (1, 5000, 1, 4), (5000, 1, 4, 1)],
)
def test_no_side_is_longer_than_the_longest_edge_nor_without_a_place(height: int, width: int, rows: int, columns: int):
    places = mistral3().prepare(blank(height, width)).expansion.count(PLACE)
    assert places == rows * columns


def test_the_patches_of_a_place_are_consecutive_and_turn_by_where_they_are():
    angles = mistral3().prepare(blank(16, 16)).passes[0]["angles"]
    assert angles.shape == (16, 4)
    # The first frequency of each axis is 1, so the angle is the row, or the column.
    assert angles[:8, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert (angles[:8, 2] / angles[1, 2]).round().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_layers_behind_the_wanted_one_are_not_declared_and_may_be_there():
    tower = mistral3(vision_feature_layer=-2).tower
    names = {name for weight in weights_in(tower.weights) for name, _ in weight.tensors()}
    assert not any(name.startswith("vision_tower.transformer.layers.2.") for name in names)
    assert tower.other_parts == ("vision_tower.transformer.layers.2.",)
    assert tower.num_layers == 2


def test_names_that_have_one_more_in_front_are_known():
    for prefix in ("", "model."):
        name = f"{prefix}vision_tower.vision_model.patch_conv.weight"
        (info,) = separate_infos([TensorInfo(name, (1, 1), 4, False, "file", "F32")], mistral3().tower.stacks)
        assert info.name == "vision_tower.patch_conv.weight"


@pytest.mark.parametrize(
    ("vision", "said", "reason"),
    [
        ({"model_type": "siglip_vision_model"}, {}, "a vision tower of type 'siglip_vision_model'"),
        ({"num_attention_heads": 3}, {}, "head_dim"),
        ({"head_dim": 4}, {}, "head_dim"),
        ({"num_channels": 1}, {}, "num_channels"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, "rope_type 'yarn'"),
        ({"hidden_act": "mish"}, {}, "hidden_act 'mish'"),
        ({}, {"vision_feature_layer": [1, 2]}, "vision_feature_layer of several layers"),
        ({}, {"vision_feature_layer": 4}, "names no layers"),
        ({}, {"files": {"processor_config.json": {"patch_size": 4, "spatial_merge_size": 1}}}, "not config.json's"),
        ({}, {"files": {"processor_config.json": {"image_break_token": "<br>"}}}, "image_break_token '<br>'"),
        ({}, {"files": {"preprocessor_config.json": {"do_resize": False}}}, "do_resize"),
        ({}, {"files": {"preprocessor_config.json": {"do_center_crop": True}}}, "do_center_crop"),
        ({}, {"files": {"preprocessor_config.json": {"resample": 9}}}, "resample 9"),
        ({}, {"files": {"preprocessor_config.json": {"image_std": [1, 0, 1]}}}, "image_std"),
        ({}, {"files": {"preprocessor_config.json": {"image_mean": [1, 0]}}}, "three channels"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(vision: dict[str, Any], said: dict[str, Any], reason: str):
    with pytest.raises(CheckpointError, match=reason):
        mistral3(vision, **said)
