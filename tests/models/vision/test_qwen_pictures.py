"""qwen_reference.json holds what transformers says; tests/parity_vision/make_qwen_reference.py writes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from models.config_reader import JSON
from models.errors import CheckpointError
from models.vision import PLACE, PictureError
from models.vision.positions import positions_of
from models.vision.qwen2_5_vl import squared
from models.vision.qwen_pictures import Cutting, read_cutting, read_marks
from tests.models.vision.folders import Folder, blank

REFERENCE = json.loads((Path(__file__).parent / "qwen_reference.json").read_text())
TOKENS = {"<|vision_start|>": [7], "<|vision_end|>": [8], "<|image_pad|>": [9]}
USUAL: Mapping[str, JSON] = {"size": {"shortest_edge": 100, "longest_edge": 900}, "image_mean": [0.5, 0.25, 0.75]}


def cutting(own: Mapping[str, Any] | None = None, whole: Mapping[str, Any] | None = None, patch: int = 5) -> Cutting:
    """What is read of these two files."""
    said = {"preprocessor_config.json": own, "processor_config.json": whole}
    files = {name: content for name, content in said.items() if content is not None}
    return read_cutting(Folder(files=files), USUAL | {"patch_size": patch}, patch=patch, merge=2, frames=2)


def own(**said: Any) -> dict[str, Any]:
    return {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 5} | said


@pytest.mark.parametrize(
    ("patch", "merge", "least", "most"), sorted({tuple(entry[:4]) for entry in REFERENCE["sizes"]})
)
def test_sides_are_the_references(patch: int, merge: int, least: int, most: int):
    own = Cutting(cutting().rules, least, most, patch, merge)
    entries = [entry[4:] for entry in REFERENCE["sizes"] if entry[:4] == [patch, merge, least, most]]
    assert len(entries) > 20
    for height, width, *expected in entries:
        assert list(own.size_of(height, width)) == expected


@pytest.mark.parametrize("entry", REFERENCE["squares"], ids=lambda entry: str(entry["grid"]))
def test_squares_are_the_references(entry: dict[str, Any]):
    order, lengths = squared(*entry["grid"])
    assert (order.tolist(), lengths.tolist()) == (entry["order"], entry["lengths"])


@pytest.mark.parametrize("entry", REFERENCE["positions"], ids=lambda entry: f"{entry['name']}-{entry['prompt']}")
def test_positions_are_the_references(entry: dict[str, Any]):
    positions = [tuple(each) for each in entry["positions"]]
    runs, place = [], 0
    for rows, columns in entry["grids"]:
        # Where a picture begins, positions along the axes part a place further on.
        place = next(at for at in range(place, len(positions)) if len(set(positions[at + 1])) > 1)
        runs.append((place, (rows, columns)))
        place += rows * columns
    assert positions_of(len(positions), runs) == (tuple(positions), entry["shift"])


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_a_picture_too_long_for_its_width_is_refused_in_words(size: tuple[int, int]):
    with pytest.raises(PictureError, match=r"pixels: one side may be at most 200 times the other"):
        cutting().cut(blank(*size))


def test_one_just_within_is_cut():
    cut = cutting().cut(blank(1, 200))
    assert (cut.rows, cut.columns) == (2, 30)
    assert cut.grid == (1, 15)
    assert cut.values.shape == (2 * 30, 3 * 25)


def test_limits_are_said_in_either_words():
    edges = cutting(own(size={"shortest_edge": 200, "longest_edge": 800}))
    assert (edges.least, edges.most) == (200, 800)
    both = cutting(own(size={"shortest_edge": 200, "longest_edge": 800}, min_pixels=300, max_pixels=700))
    assert (both.least, both.most) == (300, 700)
    inner = cutting(own(size={"min_pixels": 300, "max_pixels": 700}))
    assert (inner.least, inner.most) == (300, 700)
    assert (cutting(own()).least, cutting(own()).most) == (3136, 1003520)


def test_the_whole_processors_file_goes_before_the_pictures():
    nested = {"image_processor": own(min_pixels=300, max_pixels=700)}
    assert cutting(own(min_pixels=200, max_pixels=800), nested).least == 300
    assert cutting(own(min_pixels=200, max_pixels=800), {"processor_class": "Qwen3VLProcessor"}).least == 200


def test_without_files_a_picture_is_cut_as_published_ones_are():
    found = cutting()
    assert (found.least, found.most, found.rules.mean) == (100, 900, (0.5, 0.25, 0.75))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"do_resize": False}, "do_resize false is not supported"),
        ({"patch_size": 4}, "patch_size is 4, and config.json asks for 5"),
        ({"merge_size": 3}, "merge_size is 3, and config.json asks for 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1, and config.json asks for 2"),
        ({"min_pixels": 0}, "from 0 to"),
        ({"min_pixels": 900, "max_pixels": 800}, "from 900 to 800 pixels"),
    ],
)
def test_what_makes_no_sense_or_is_not_honoured_is_refused(said: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json.*{named}"):
        cutting(own(**said))


def test_an_expansion_has_the_tokens_around_it():
    marks = read_marks(Folder(), TOKENS.__getitem__)
    assert marks.around(3) == (7, PLACE, PLACE, PLACE, 8)
    assert marks.filler == 9
    assert read_marks(Folder({"image_token_id": 12}), TOKENS.__getitem__).filler == 12


def test_a_vocabulary_without_these_tokens_is_refused():
    with pytest.raises(CheckpointError, match=r"vision_end"):
        read_marks(Folder(), (TOKENS | {"<|vision_end|>": [1, 2]}).__getitem__)
