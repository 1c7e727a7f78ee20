"""Idefics3's tiles; make_tiles_reference.py writes what transformers says into tiles_reference.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.errors import CheckpointError
from models.vision import PLACE, Vision, family_of
from models.vision.idefics3 import bucketed, scaled, whole_tiles
from tests.models.vision.folders import Folder, blank

REFERENCE = json.loads((Path(__file__).parent / "tiles_reference.json").read_text())
IMAGE = 292
TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SEEN: Mapping[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CONFIG: Mapping[str, Any] = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "text_config": TEXT,
    "vision_config": SEEN,
}
PROCESSOR: Mapping[str, Any] = {"size": {"longest_edge": 30}, "max_image_size": {"longest_edge": 16}}


def by_character(text: str) -> Sequence[int]:
    """A tokenizer of characters, and of one special token."""
    ids: list[int] = []
    for number, part in enumerate(text.split("<image>")):
        ids += [IMAGE] * bool(number)
        ids += [ord(character) for character in part]
    return ids


def built(config: Mapping[str, Any] = CONFIG, processor: Mapping[str, Any] = PROCESSOR, **whole: Any) -> Vision:
    files = {"preprocessor_config.json": processor, **({"processor_config.json": whole} if whole else {})}
    folder = Folder(config, files)
    family = family_of(folder)
    assert family is not None
    return family.build(folder, by_character)


@pytest.mark.parametrize("case", REFERENCE["tiles"])
def test_a_picture_is_resized_and_cut_as_transformers_does_it(case: dict[str, Any]):
    height, width, whole_height, whole_width, rows, columns = case["tiles"]
    longest, tile = case["edges"]
    assert scaled(*case["size"], longest) == (height, width)
    assert whole_tiles(height, width, tile) == (whole_height, whole_width)
    count = (whole_height // tile, whole_width // tile)
    assert (rows, columns) == ((0, 0) if count == (1, 1) else count)


@pytest.mark.parametrize("case", REFERENCE["buckets"], ids=lambda case: str(case["of"]))
def test_positions_are_spread_over_the_table_as_transformers_spreads_them(case: dict[str, Any]):
    per_side, count = case["of"]
    along = bucketed(count, per_side)
    assert (along[:, None] * per_side + along).reshape(-1).tolist() == case["buckets"]


def test_each_tile_is_a_pass_and_the_whole_picture_is_the_last():
    prepared = built().prepare(blank(20, 30))
    assert [given["patches"].shape for given in prepared.passes] == [(16, 48)] * 5
    assert prepared.patches == 16
    text = "".join(chr(token) if token != PLACE else "." for token in prepared.expansion)
    around = "<fake_token_around_image>"
    rows = "".join(f"{around}<row_{row}_col_1>....{around}<row_{row}_col_2>....\n" for row in (1, 2))
    assert text == f"{rows}\n{around}<global-img>....{around}"


def test_without_splitting_a_picture_is_one_tile():
    prepared = built(processor={**PROCESSOR, "do_image_splitting": False}).prepare(blank(20, 30))
    assert len(prepared.passes) == 1
    assert prepared.expansion.count(PLACE) == 4


def test_a_picture_of_one_tile_is_not_looked_at_twice():
    prepared = built(processor={**PROCESSOR, "size": {"longest_edge": 16}}).prepare(blank(15, 15))
    assert len(prepared.passes) == 1


def test_a_picture_one_pixel_wide_still_has_tiles():
    prepared = built().prepare(blank(500, 1))
    assert prepared.expansion.count(PLACE) == 4 * len(prepared.passes)


@pytest.mark.parametrize(
    ("config", "processor", "whole", "named"),
    [
        ({}, {"max_image_size": {"longest_edge": 20}}, {}, "tiles of 20 pixels"),
        ({}, {"size": {"height": 5, "width": 5}}, {}, "size without longest_edge"),
        ({}, {}, {"image_seq_len": 9}, "image_seq_len must be 4"),
        ({"image_token_id": 5}, {}, {}, "image_token_id 5"),
        ({"image_token_id": 300}, {}, {}, "image_token_id 300"),
        ({"text_config": {**TEXT, "model_type": "mistral"}}, {}, {}, "mistral"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    config: dict[str, Any], processor: dict[str, Any], whole: dict[str, Any], named: str
):
    with pytest.raises(CheckpointError, match=named):
        built({**CONFIG, **config}, {**PROCESSOR, **processor}, **whole)
