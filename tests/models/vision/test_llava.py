from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.vision import PLACE, PictureError, Vision
from models.vision.llava import FAMILY
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
IMAGES = {"size": {"shortest_edge": 8}, "crop_size": 8}


def llava(vision: Mapping[str, Any] | None = None, images: Mapping[str, Any] | None = None, **said: Any) -> Vision:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": TEXT,
        "vision_config": VISION | dict(vision or {}),
        "image_token_index": 7,
        **said,
    }
    files = {"preprocessor_config.json": IMAGES | dict(images or {})}
    return FAMILY.build(Folder(config, files), lambda _: [3])


def test_a_picture_has_as_many_places_as_the_tower_has_patches_whatever_its_size():
    prepare = llava().prepare
    assert {prepare(blank(*size)).expansion for size in ((1, 1), (8, 8), (90, 40), (3, 50))} == {(PLACE,) * 4}
    assert llava(vision_feature_select_strategy="full").prepare(blank(8, 8)).expansion == (PLACE,) * 5


def test_the_class_token_is_a_patch_of_zeros_with_a_flag_and_the_first_position():
    (given,) = llava(images={"image_mean": 0.25}).prepare(blank(8, 8)).passes
    assert given["class"].tolist() == [[1], [0], [0], [0], [0]]
    assert not given["patches"][0].any()
    assert given["patches"][1:].all()
    assert given["positions"].tolist() == [0, 1, 2, 3, 4]
    assert given["kept"].tolist() == [1, 2, 3, 4]


def test_a_crop_larger_than_the_picture_is_black_around():
    bright = np.full((4, 4, 3), 255, np.uint8)
    given = llava(images={"size": {"shortest_edge": 4}, "do_normalize": False}).prepare(bright).passes[0]
    assert [patch.reshape(3, 4, 4).sum() for patch in given["patches"][1:]] == [12, 12, 12, 12]


def test_a_line_of_pixels_that_would_fill_memory_is_refused():
    with pytest.raises(PictureError, match="too narrow"):
        llava().prepare(blank(1, 2_000_000))
    padded = llava(images={"image_processor_type": "LlavaImageProcessor", "do_pad": True})
    with pytest.raises(PictureError, match="too narrow"):
        padded.prepare(blank(1, 20_000))


def test_a_placeholder_beyond_the_vocabulary_is_looked_up_nowhere():
    assert llava().filler == 7
    assert llava(image_token_index=20).filler == 0


@pytest.mark.parametrize(
    ("vision", "images", "said", "reason"),
    [
        ({"model_type": "vit"}, {}, {}, "a vision tower of type 'vit'"),
        ({"num_attention_heads": 3}, {}, {}, "no 3 heads"),
        ({"image_size": [8, 9]}, {}, {}, "image_size"),
        ({"hidden_act": "mish"}, {}, {}, "hidden_act 'mish'"),
        ({}, {"crop_size": 9}, {}, "a size other than 8"),
        ({}, {"do_center_crop": False}, {}, "a size other than 8"),
        ({}, {"do_pad": True}, {}, "do_pad"),
        ({}, {}, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy 'cls'"),
        ({}, {}, {"vision_feature_layer": []}, "names no layers"),
        ({}, {}, {"vision_feature_layer": -4}, "names no layers"),
        ({}, {}, {"projector_hidden_act": "mish"}, "projector_hidden_act 'mish'"),
        ({"model_type": "pixtral"}, {}, {}, "vision_feature_select_strategy must be full"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    vision: dict[str, Any], images: dict[str, Any], said: dict[str, Any], reason: str
):
    with pytest.raises(CheckpointError, match=reason):
        llava(vision, images, **said)
