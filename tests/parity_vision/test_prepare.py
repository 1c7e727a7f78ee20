"""What is done to pictures and prompts on the host, against what transformers' processors do."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.vision import PLACE, discover
from tests.parity_vision.rows import FOLDERS, HERE, PICTURES, pixels_of, planned, read_prompts, sight_of

TOLERANCE = 1e-5
PATCHES = "patches"
"""What every tower is given its patches as."""


def test_every_family_has_a_fixture():
    configs = [json.loads((HERE / name / "config.json").read_text()) for name in FOLDERS]
    covered = {name for config in configs for name in config["architectures"]}
    lacking = [family.hf for family in discover() if not covered & set(family.hf)]
    assert lacking == []


def reference_patches(name: str, number: int) -> np.ndarray:
    """The reference's pixels of a picture, cut into patches. Shapes: returns (T, values of a patch)."""
    pixels = load_file(HERE / name / "reference.safetensors")[f"pixel_values.{number}"]
    config = json.loads((HERE / name / "config.json").read_text())
    if pixels.ndim == 2 and config["model_type"] == "muse_glimmer":
        # A still picture's equal frames lie one behind the other, and the first is enough.
        first, second = np.split(pixels, 2, axis=1)
        assert np.array_equal(first, second)
        return first
    if pixels.ndim == 2:
        return pixels
    if config["model_type"] == "gemma4":
        # The reference's model does the last step itself; patches of zeros are padding, here and there.
        pixels = np.where(np.abs(pixels).max(axis=-1, keepdims=True) > 0, 2 * (pixels - 0.5), 0)
    if pixels.ndim == 3:
        return pixels.reshape(-1, pixels.shape[-1])
    size = config["vision_config"]["patch_size"]
    pictures = pixels.reshape(-1, *pixels.shape[-3:])
    count, channels, height, width = pictures.shape
    cut = pictures.reshape(count, channels, height // size, size, width // size, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def without_frames(patches: np.ndarray, width: int) -> np.ndarray:
    """The first of a still picture's equal frames, which lie behind its channels. Shapes: returns (T, width)."""
    frames = patches.reshape(len(patches), 3, -1, width // 3)
    assert np.array_equal(frames[:, :, 0], frames[:, :, -1])
    return np.ascontiguousarray(frames[:, :, 0]).reshape(len(patches), width)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_prompt_has_the_references_ids(name: str):
    sight = sight_of(name)
    config = json.loads((HERE / name / "config.json").read_text())
    place = config.get("image_token_id", config.get("image_token_index"))
    for prompt in read_prompts(name):
        wanted = [sight.vision.filler if token == place else token for token in prompt.ids]
        assert planned(sight, prompt.text).tokens == wanted


@pytest.mark.parametrize("number", range(len(PICTURES)))
@pytest.mark.parametrize("name", FOLDERS)
def test_a_pictures_patches_are_the_references_in_some_order(name: str, number: int):
    """What they are in is the family's own; that it is right is seen by what the tower makes of them."""
    passes = sight_of(name).vision.prepare(pixels_of(number)).passes
    found = np.concatenate([given[PATCHES] for given in passes])
    # A class token is a patch of zeros.
    found = found[np.abs(found).max(axis=1) > 0]
    wanted = without_frames(reference_patches(name, number), found.shape[1])
    wanted = wanted[np.abs(wanted).max(axis=1) > 0]
    assert found.dtype == np.float32
    assert len(found) == len(wanted)
    taken: set[int] = set()
    for patch in found:
        errors = np.abs(wanted - patch).max(axis=1)
        errors[list(taken)] = math.inf
        taken.add(int(errors.argmin()))
        assert errors.min() <= TOLERANCE


@pytest.mark.parametrize("number", range(len(PICTURES)))
@pytest.mark.parametrize("name", FOLDERS)
def test_a_picture_has_a_place_for_each_of_the_references_rows(name: str, number: int):
    prepared = sight_of(name).vision.prepare(pixels_of(number))
    rows = load_file(HERE / name / "reference.safetensors")[f"features.{number}"]
    assert prepared.expansion.count(PLACE) == len(rows)
    assert prepared.grid is None or math.prod(prepared.grid) == len(rows)


@pytest.mark.parametrize("name", FOLDERS)
def test_passes_have_no_more_patches_than_they_say(name: str):
    for number in range(len(PICTURES)):
        prepared = sight_of(name).vision.prepare(pixels_of(number))
        assert max(len(given[PATCHES]) for given in prepared.passes) <= prepared.patches
