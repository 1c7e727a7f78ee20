"""Families of image pipelines are found by looking, and each has its fixture."""

import json
from pathlib import Path

import pytest

from models.errors import UnsupportedArchitecture
from models.image import discover, find_family, is_pipeline

FIXTURES = Path(__file__).parents[2] / "parity_image"


def test_every_family_has_a_fixture() -> None:
    indexes = [json.loads(file.read_text()) for file in FIXTURES.glob("*/model_index.json")]
    with_goldens = {index["_class_name"] for index in indexes}
    for family in discover():
        assert set(family.class_names) <= with_goldens, f"make a fixture for {family.class_names}"


def test_no_two_families_claim_one_name() -> None:
    names = [name for family in discover() for name in family.class_names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", ["_class_name", "architecture"])
def test_a_family_is_found_by_diffusers_key_and_by_ollamas(key: str) -> None:
    config = {key: "ZImagePipeline"}
    assert is_pipeline(config)
    assert find_family(config).class_names == ("ZImagePipeline",)


def test_an_unknown_pipeline_is_told_those_there_are() -> None:
    with pytest.raises(UnsupportedArchitecture, match="QwenImagePipeline is not supported; supported: Flux2Klein"):
        find_family({"_class_name": "QwenImagePipeline"})


def test_a_language_model_is_no_pipeline() -> None:
    assert not is_pipeline({"architectures": ["LlamaForCausalLM"]})
