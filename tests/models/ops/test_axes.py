"""axes_reference.json holds transformers' axes of pairs; tests/parity/make_axes_reference.py writes it."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.config_reader import JSON
from models.errors import CheckpointError
from models.ops.rope import LinearScaling, read_rope, with_axes

REFERENCE = json.loads((Path(__file__).parent / "axes_reference.json").read_text())
TURNS: dict[str, JSON] = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("entry", REFERENCE, ids=lambda entry: str(entry["settings"]["mrope_section"]))
def test_each_pair_turns_by_the_references_axis(entry: dict[str, Any], key: str):
    rope = read_rope({key: entry["settings"], "rope_theta": 500.0}, dims=entry["head_dim"])
    assert list(rope.axes) == entry["axes"]
    assert len(rope.axes) == rope.dims // 2


def test_where_nothing_is_said_of_axes_there_is_one():
    assert read_rope({"rope_theta": 500.0}, dims=8).axes == ()
    assert read_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, dims=8).axes == ()


def test_frequencies_are_scaled_beside():
    settings: dict[str, JSON] = {"type": "linear", "factor": 2.0, **TURNS}
    rope = read_rope({"rope_scaling": settings}, dims=8)
    assert (rope.scaling, rope.axes) == (LinearScaling(2.0), (0, 1, 2, 0))


def test_an_architectures_sections_are_for_what_the_config_does_not_say():
    assert read_rope(with_axes({}, (1, 1, 2), interleaved=False), dims=8).axes == (0, 1, 2, 2)
    assert read_rope(with_axes({"rope_scaling": None}, (1, 1, 2), interleaved=True), dims=8).axes == (0, 1, 2, 0)
    own: dict[str, JSON] = {"mrope_section": [2, 2, 0], "rope_theta": 500.0}
    said = read_rope(with_axes({"rope_parameters": own}, (1, 1, 2), interleaved=False), dims=8)
    assert (said.axes, said.theta) == ((0, 0, 1, 1), 500.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mrope_section": [1, 1, 1]}, r"mrope_section \[1, 1, 1\] does not divide 4 pairs"),
        ({"mrope_section": [5, -1, 0]}, "mrope_section"),
        ({"mrope_section": [2, 2], "mrope_interleaved": True}, "mrope_section must name 3 sizes"),
        ({"mrope_section": 4}, "mrope_section must be a list"),
        ({"mrope_section": [2, 1, 1], "mrope_interleaved": 1}, "mrope_interleaved must be true or false"),
    ],
)
def test_sections_that_make_no_sense_are_refused(settings: dict[str, JSON], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_rope({"rope_scaling": settings}, dims=8)
