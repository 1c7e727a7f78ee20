"""rope_reference.json holds transformers' frequencies; tests/parity/make_rope_reference.py writes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.ops.rope import FactorScaling, RopeConfig, read_rope

REFERENCE = json.loads((Path(__file__).parent / "rope_reference.json").read_text())
KEYS = ("rope_theta", "max_position_embeddings", "rope_scaling")


def old_spelling(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in KEYS}


def new_spelling(entry: dict[str, Any]) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": entry["rope_theta"], **(entry["rope_scaling"] or {})}
    return {"max_position_embeddings": entry["max_position_embeddings"], "rope_parameters": parameters}


def spelled() -> list[Any]:
    """Every setting in both spellings; `type` is of the old one alone."""
    return [
        pytest.param(spelling(entry), entry, id=f"{entry['name']}-{spelling.__name__}")
        for entry in REFERENCE
        for spelling in (old_spelling, new_spelling)
        if spelling is old_spelling or "type" not in (entry["rope_scaling"] or {})
    ]


@pytest.mark.parametrize(("config", "entry"), spelled())
def test_frequencies_are_the_references(config: dict[str, Any], entry: dict[str, Any]):
    rope = read_rope(config, dims=entry["head_dim"])
    np.testing.assert_allclose(rope.frequencies(entry["reach"]), entry["frequencies"], rtol=2e-6)
    assert rope.magnitude == pytest.approx(entry["attention_scaling"], rel=1e-7)


def test_nothing_said_is_the_default():
    rope = read_rope({}, dims=8)
    np.testing.assert_allclose(rope.frequencies(), [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert rope.magnitude == 1.0


def test_the_new_spelling_goes_before_the_old():
    config = {
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    }
    np.testing.assert_allclose(read_rope(config, dims=4).frequencies(), [0.25, 0.0025], rtol=1e-6)


def test_a_missing_original_context_is_the_models_own():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    said = read_rope({"rope_scaling": scaling | {"original_max_position_embeddings": 64}}, dims=16)
    meant = read_rope({"rope_scaling": scaling, "max_position_embeddings": 64}, dims=16)
    assert said == meant


def test_factors_of_a_gguf_file_divide():
    rope = RopeConfig(4, 10000.0, FactorScaling((1.0, 8.0)))
    np.testing.assert_allclose(rope.frequencies(), [1.0, 0.01 / 8], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor is missing"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "1 rope factors for a head of 4"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "original_max_position_embeddings": 0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0, 2.0, 3.0]}}, "3 rope factors"),
    ],
)
def test_impossible_settings_are_refused_by_name(config: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_rope(config, dims=4)
