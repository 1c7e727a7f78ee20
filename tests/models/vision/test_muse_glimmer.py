from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.vision import PLACE, Vision
from models.vision.muse_glimmer import FAMILY
from tests.models.vision.folders import Folder, blank

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}
IMAGES = {"patch_size": 2, "max_image_tokens": 12}
TOKENS = {"<|image_start|>": [17], "<|image_end|>": [18]}


def glimmer(vision: Mapping[str, Any] | None = None, images: Mapping[str, Any] | None = None, **said: Any) -> Vision:
    config = {
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "text_config": TEXT,
        "vision_config": VISION | dict(vision or {}),
        "out_hidden_size": 64,
        "projector_hidden_size": 8,
        **said,
    }
    files = {"preprocessor_config.json": IMAGES | dict(images or {})}
    return FAMILY.build(Folder(config, files), lambda text: TOKENS.get(text, []))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(1, 1, 1, 1), (12, 16, 3, 4), (50, 50, 3, 3), (1, 40, 1, 10), (40, 1, 10, 1), (6, 6, 2, 2), (13, 9, 3, 2)],
)
def test_a_picture_has_the_places_that_are_nearest_to_its_proportions(height: int, width: int, rows: int, columns: int):
    assert glimmer().prepare(blank(height, width)).expansion == (17, *(PLACE,) * (rows * columns), 18)


def test_patches_come_window_by_window_and_go_back_into_squares():
    (given,) = glimmer().prepare(blank(12, 16)).passes
    assert given["windows"].tolist() == [16, 16, 8, 8]
    # Counted from 1, columns first; the first frequency is 1.
    column, row = (given["angles"][:, part].round().astype(int) - 1 for part in (0, 2))
    assert [*zip(row[:5].tolist(), column[:5].tolist(), strict=True)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert (row[16], column[16]) == (0, 4)
    squares = [(int(row[n]), int(column[n])) for n in given["merged"]]
    assert squares[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_positions_beyond_the_square_count_for_nothing():
    (given,) = glimmer().prepare(blank(16, 16)).passes
    shares = np.concatenate([given[f"share.{corner}"] for corner in range(4)], axis=1)
    assert shares.min() >= 0
    assert shares.sum(axis=1).max() == pytest.approx(1)
    # Half a place outside along both axes: a quarter of one corner is left.
    assert shares.sum(axis=1).min() < 1


@pytest.mark.parametrize(
    ("vision", "images", "said", "reason"),
    [
        ({"num_attention_heads": 3}, {}, {}, "3 heads cannot share"),
        ({"pos_emb_width": 5}, {}, {}, "no square"),
        ({"layer_types": ["window_attention"]}, {}, {}, "layer_types"),
        ({"layer_types": ["window_attention", "sliding_attention"]}, {}, {}, "layer_types"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, {}, "rope_type 'yarn'"),
        ({}, {"patch_size": 4}, {}, "patch_size is 4"),
        ({}, {"temporal_patch_size": 1}, {}, "temporal_patch_size is 1"),
        ({}, {}, {"out_hidden_size": 32}, "out_hidden_size is 32"),
        ({}, {}, {"projector_hidden_act": "mish"}, "projector_hidden_act 'mish'"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    vision: dict[str, Any], images: dict[str, Any], said: dict[str, Any], reason: str
):
    with pytest.raises(CheckpointError, match=reason):
        glimmer(vision, images, **said)
