"""Gemma 3's pictures; make_tiles_reference.py writes what transformers says into tiles_reference.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.vision import PLACE, Vision, family_of
from models.vision.gemma3 import Expansion, PanAndScan
from tests.models.vision.folders import Folder, blank

REFERENCE = json.loads((Path(__file__).parent / "tiles_reference.json").read_text())
TEXT: Mapping[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SEEN: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CONFIG: Mapping[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 290,
    "eoi_token_index": 291,
    "image_token_index": 292,
    "mm_tokens_per_image": 4,
    "text_config": TEXT,
    "vision_config": SEEN,
}
PROCESSOR: Mapping[str, Any] = {"size": {"height": 16, "width": 16}}


def by_length(text: str) -> list[int]:
    """A tokenizer that says how long a text is."""
    return [len(text)]


def built(config: Mapping[str, Any] = CONFIG, processor: Mapping[str, Any] = PROCESSOR) -> Vision:
    folder = Folder(config, {"preprocessor_config.json": processor})
    family = family_of(folder)
    assert family is not None
    return family.build(folder, by_length)


@pytest.mark.parametrize("case", REFERENCE["crops"])
def test_a_long_picture_is_cut_as_transformers_cuts_it(case: dict[str, Any]):
    height, width = case["size"]
    where = np.stack([*np.mgrid[:height, :width], np.zeros((height, width))], axis=-1).astype(np.uint16)
    parts = [part for part in PanAndScan(*case["scan"]).parts(where) if part.size]
    assert [[*map(int, part[0, 0, :2]), *part.shape[:2]] for part in parts] == case["crops"]


def test_a_pictures_tokens_lie_between_empty_lines():
    expansion = Expansion(7, 8, 3, (1, 2), by_length)
    assert expansion.tokens(0) == (1, 2, 7, PLACE, PLACE, PLACE, 8, 1, 2)


def test_crops_are_introduced_in_words():
    expansion = Expansion(7, 8, 1, (1, 2), by_length)
    whole = (7, PLACE, 8)
    begin, then = "Here is the original image \n\n", "\n\n and here are some crops to help you see better \n\n"
    assert expansion.tokens(2) == (len(begin), *whole, len(then), *whole, len("\n\n \n\n"), *whole, 1, 2)


def test_a_picture_is_one_pass_and_its_crops_are_passes_of_their_own():
    scanning = PROCESSOR | {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10}
    prepared = built(processor=scanning).prepare(blank(20, 40))
    assert [given["patches"].shape for given in prepared.passes] == [(16, 48)] * 3
    assert prepared.expansion.count(PLACE) == 3 * 4
    assert len(built().prepare(blank(20, 40)).passes) == 1


def test_windows_are_consecutive_and_every_patch_has_its_own_position():
    prepared = built().prepare(blank(16, 16))
    assert prepared.passes[0]["positions"].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_a_picture_is_one_run_that_looks_both_ways():
    vision = built()
    assert vision.longest_run == 4
    assert vision.filler == 292


def test_a_picture_token_beyond_the_vocabulary_is_filled_with_one_within():
    assert built({**CONFIG, "image_token_index": 300}).filler == 0


@pytest.mark.parametrize(
    ("config", "processor", "named"),
    [
        ({"mm_tokens_per_image": 5}, {}, "mm_tokens_per_image 5"),
        ({"mm_tokens_per_image": 9}, {}, "mm_tokens_per_image 9"),
        ({"vision_config": {**SEEN, "model_type": "clip_vision_model"}}, {}, "clip_vision_model"),
        ({"vision_config": {**SEEN, "num_channels": 1}}, {}, "num_channels"),
        ({"vision_config": {**SEEN, "num_attention_heads": 3}}, {}, "no 3 heads"),
        ({"vision_config": {**SEEN, "hidden_act": "mish"}}, {}, "mish"),
        ({}, {"size": {"height": 32, "width": 32}}, "size other than 16"),
        ({}, {"do_resize": False}, "do_resize"),
        ({}, {"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(config: dict[str, Any], processor: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        built({**CONFIG, **config}, {**PROCESSOR, **processor})
