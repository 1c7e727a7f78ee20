"""Qwens that see, part by part: what becomes of pictures on the host, and what the towers make of it."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.executors.base import EncodedPicture, PictureEncoder
from models.executors.mlx.tower import load_tower as load_mlx
from models.executors.onnx.tower import load_tower as load_onnx
from models.vision import PLACE
from tests.parity_vision.rows import HERE, PICTURES, Sight, pixels_of, planned, read_prompts, sight_of

NAMES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vl", "qwen3_5_moe_vl")
LOADERS: dict[str, Callable[..., PictureEncoder]] = {"onnx": load_onnx, "mlx": load_mlx}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sight(name: str) -> Sight:
    return sight_of(name)


def encoded(name: str, kind: str) -> list[EncodedPicture]:
    """Each picture, by a tower that is loaded for it."""
    vision = sight_of(name).vision
    encoder = LOADERS[kind](open_checkpoint(str(HERE / name), HERE), vision.tower)
    made = []
    for number in range(len(PICTURES)):
        steps = encoder.encode(vision.prepare(pixels_of(number)).passes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                made.append(end.value)
                break
    encoder.close()
    return made


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_prompts_tokens_are_the_references(name: str, sight: Sight):
    for prompt in read_prompts(name):
        assert planned(sight, prompt.text).tokens == prompt.ids


def test_pixels_are_the_references(name: str, sight: Sight):
    arrays = load_file(HERE / name / "reference.safetensors")
    for number in range(len(PICTURES)):
        prepared = sight.vision.prepare(pixels_of(number))
        (given,) = prepared.passes
        expected = arrays[f"pixel_values.{number}"]
        # The reference has a picture once for each frame of a video.
        frames = expected.shape[1] // given["patches"].shape[1]
        own = given["patches"].reshape(len(expected), 3, 1, -1).repeat(frames, axis=2).reshape(expected.shape)
        order = given.get("back")
        if order is not None:
            own = own.reshape(len(order), -1)[order].reshape(expected.shape)
        assert_close(own, expected, 1e-5)
        _, rows, columns = arrays[f"image_grid_thw.{number}"][0].tolist()
        assert prepared.patches == rows * columns
        assert prepared.grid is not None
        assert prepared.grid[0] * columns == prepared.grid[1] * rows
        assert prepared.expansion.count(PLACE) == len(arrays[f"features.{number}"]) == np.prod(prepared.grid)


@pytest.mark.parametrize(("folder", "kind"), list(product(NAMES, LOADERS)))
def test_rows_are_the_references_at_every_depth(folder: str, kind: str):
    arrays = load_file(HERE / folder / "reference.safetensors")
    deep = sight_of(folder).vision.tower.deep
    for number, made in enumerate(encoded(folder, kind)):
        assert_close(made.rows, arrays[f"features.{number}"], 1e-4)
        assert len(made.deep) == deep == sum(key.startswith(f"deep.{number}.") for key in arrays)
        for level, rows in enumerate(made.deep):
            assert_close(rows, arrays[f"deep.{number}.{level}"], 1e-4)


def test_fixtures_look_through_one_exit_and_several():
    assert {name: sight_of(name).vision.tower.deep for name in NAMES} == {
        "qwen2_5_vl": 0,
        "qwen3_vl": 2,
        "qwen3_vl_moe": 1,
        "qwen3_5_vl": 0,
        "qwen3_5_moe_vl": 0,
    }
