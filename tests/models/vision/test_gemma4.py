from collections.abc import Mapping
from typing import Any

import pytest

from models.arch import build_model
from models.errors import CheckpointError
from models.vision import PLACE, PictureError, Vision
from models.vision.gemma4 import FAMILY
from tests.models.arch.attentions import attentions
from tests.models.vision.folders import Folder, blank

KINDS = ["sliding_attention", "full_attention"]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "layer_types": KINDS,
    "vocab_size": 20,
    "vocab_size_per_layer_input": 20,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": 6,
}
VISION = {
    "hidden_size": 16,
    "head_dim": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "patch_size": 2,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
IMAGES = {"max_soft_tokens": 70, "patch_size": 2, "pooling_kernel_size": 2}


def config(vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": TEXT | dict(text),
        "vision_config": VISION | dict(vision),
        "boi_token_id": 17,
        "eoi_token_id": 18,
    }


def gemma4(vision: Mapping[str, Any] | None = None, images: Mapping[str, Any] | None = None, **text: Any) -> Vision:
    files = {"processor_config.json": {"image_processor": IMAGES | dict(images or {})}}
    return FAMILY.build(Folder(config(vision or {}, text), files), lambda _: [])


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(1, 1, 8, 8), (40, 90, 5, 12), (90, 40, 12, 5), (5, 60, 2, 28), (9, 7, 9, 7)],
)
def test_a_picture_fills_its_budget_in_its_proportions(height: int, width: int, rows: int, columns: int):
    prepared = gemma4().prepare(blank(height, width))
    assert prepared.expansion == (17, *(PLACE,) * (rows * columns), 18)
    given = prepared.passes[0]
    assert (given["rows"].max() - 63, given["columns"].max() + 1) == (2 * rows, 2 * columns)
    assert given["rows"][:4].tolist() == [64, 64, 65, 65]
    assert given["columns"][:4].tolist() == [0, 1, 0, 1]


def test_a_picture_with_more_columns_than_positions_is_refused():
    with pytest.raises(PictureError, match="no positions"):
        gemma4().prepare(blank(1, 5000))


def test_pictures_look_both_ways_where_the_text_model_says_so_and_only_in_layers_that_slide():
    assert gemma4().longest_run is None
    assert gemma4(use_bidirectional_attention="vision").longest_run == 70
    assert gemma4(images={"max_soft_tokens": 140}, use_bidirectional_attention="vision").longest_run == 140
    for said, looks in (({}, False), ({"use_bidirectional_attention": "vision"}, True)):
        assert [spec.two_way for spec in attentions(build_model(config({}, said)))] == [looks, False]


def test_in_a_pictures_places_other_tables_see_padding():
    assert gemma4().filler == 6


@pytest.mark.parametrize(
    ("vision", "images", "reason"),
    [
        ({"num_key_value_heads": 3}, {}, "cannot share 3"),
        ({"head_dim": 6}, {}, "cannot share"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 0.5}}, {}, "rope_theta"),
        ({"hidden_activation": "mish"}, {}, "hidden_activation 'mish'"),
        ({}, {"max_soft_tokens": 71}, "max_soft_tokens"),
        ({}, {"patch_size": 4}, "not config.json's"),
        ({}, {"pooling_kernel_size": 3}, "not config.json's"),
        ({}, {"do_resize": False}, "do_resize"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(vision: dict[str, Any], images: dict[str, Any], reason: str):
    with pytest.raises(CheckpointError, match=reason):
        gemma4(vision, images)
