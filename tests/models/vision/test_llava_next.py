from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.vision import PLACE, Vision
from models.vision.llava_next import FAMILY, best_resolution
from tests.models.vision.folders import Folder, blank

TEXT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "image_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
}
PINPOINTS = [[8, 16], [16, 8], [16, 16], [8, 24]]
IMAGES = {"size": {"shortest_edge": 8}, "crop_size": 8, "image_grid_pinpoints": PINPOINTS}


def llava_next(vision: Mapping[str, Any] | None = None, images: Mapping[str, Any] | None = None, **said: Any) -> Vision:
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": PINPOINTS,
        "text_config": TEXT,
        "vision_config": VISION | dict(vision or {}),
        **said,
    }
    return FAMILY.build(Folder(config, {"preprocessor_config.json": IMAGES | dict(images or {})}), lambda _: [3])


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(8, 8, (8, 16)), (30, 30, (16, 16)), (30, 10, (16, 8)), (10, 40, (8, 24)), (1, 1, (8, 16)), (16, 16, (16, 16))],
)
def test_the_size_that_keeps_most_is_taken_and_of_equals_the_smallest(height: int, width: int, wanted: tuple[int, int]):
    assert best_resolution(height, width, [(8, 16), (16, 8), (16, 16), (8, 24)]) == wanted


def test_the_whole_picture_comes_first_and_each_line_of_the_tiles_has_an_end():
    prepared = llava_next().prepare(blank(16, 16))
    (given,) = prepared.passes
    assert given["tiles"].tolist() == [5] * 5
    assert prepared.patches == 25
    assert prepared.expansion == (PLACE,) * (4 + 4 * 5)
    # Tokens of the tiles' first line, of the upper two: none is a class token.
    assert given["taken"][:8].tolist() == [1, 2, 3, 4, 6, 7, 11, 12]
    assert np.flatnonzero(given["is_end"]).tolist() == [8, 13, 18, 23]
    assert (given["is_end"] + given["is_patch"]).tolist() == [[1]] * 24


def test_what_was_padded_has_no_places():
    # Twice as wide as high on a square of 4 x 4 patches would be padded above and below.
    assert len(llava_next(images={"image_grid_pinpoints": None}).prepare(blank(16, 16)).expansion) == 24
    only_square = llava_next(images={"image_grid_pinpoints": [[16, 16]]}, image_grid_pinpoints=[[16, 16]])
    assert len(only_square.prepare(blank(10, 20)).expansion) == 4 + 2 * 5
    assert len(only_square.prepare(blank(20, 10)).expansion) == 4 + 4 * 3


@pytest.mark.parametrize(
    ("vision", "images", "said", "reason"),
    [
        ({"model_type": "vit"}, {}, {}, "a vision tower of type 'vit'"),
        ({}, {"crop_size": 9}, {}, "a size other than 8"),
        ({}, {"size": 9}, {}, "a size other than 8"),
        ({}, {"image_grid_pinpoints": [[8, 8]]}, {}, "not config.json's"),
        ({}, {"image_grid_pinpoints": [[8]]}, {}, "must be pairs"),
        ({}, {"image_grid_pinpoints": None}, {"image_grid_pinpoints": [[8, 9]]}, "not whole tiles"),
        ({}, {}, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    vision: dict[str, Any], images: dict[str, Any], said: dict[str, Any], reason: str
):
    with pytest.raises(CheckpointError, match=reason):
        llava_next(vision, images, **said)
