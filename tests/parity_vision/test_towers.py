"""What towers make of pictures, on every executor, against transformers."""

from collections.abc import Generator, Iterator
from itertools import product
from typing import TypeVar

import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.executors.base import EncodedPicture, PictureEncoder
from models.vision import Vision
from tests.parity_vision.rows import EXECUTORS, FOLDERS, HERE, PICTURES, encoded_pictures, pixels_of, sight_of

TOLERANCE = 1e-4

Made = TypeVar("Made")


def finished(work: Generator[None, None, Made]) -> Made:
    """What a piece of work comes to when nothing runs between its parts."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            made: Made = end.value
            return made


def load(name: str, kind: str, vision: Vision) -> PictureEncoder:
    checkpoint = open_checkpoint(str(HERE / name), HERE / "no-store")
    if kind == "onnx":
        from models.executors.onnx import load_tower as load_onnx

        return load_onnx(checkpoint, vision.tower, threads=2)
    from models.executors.mlx import load_tower as load_mlx

    return load_mlx(checkpoint, vision.tower)


Loaded = tuple[str, Vision, PictureEncoder]


@pytest.fixture(scope="module", params=list(product(FOLDERS, EXECUTORS)), ids="-".join)
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    name, kind = request.param
    vision = sight_of(name).vision
    encoder = load(name, kind, vision)
    yield name, vision, encoder
    encoder.close()


def assert_close(found: EncodedPicture, wanted: EncodedPicture) -> None:
    assert len(found.deep) == len(wanted.deep)
    for own, reference in zip((found.rows, *found.deep), (wanted.rows, *wanted.deep), strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, reference, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(reference).max())))


def test_a_pictures_rows_are_the_references(loaded: Loaded):
    name, vision, encoder = loaded
    for number, wanted in enumerate(encoded_pictures(name)):
        assert_close(finished(encoder.encode(vision.prepare(pixels_of(number)).passes)), wanted)


def test_two_pictures_may_take_turns_and_one_be_given_up(loaded: Loaded):
    name, vision, encoder = loaded
    wanted = encoded_pictures(name)
    given_up = encoder.encode(vision.prepare(pixels_of(0)).passes)
    next(given_up, None)
    works = [encoder.encode(vision.prepare(pixels_of(number)).passes) for number in range(len(PICTURES))]
    made: dict[int, EncodedPicture] = {}
    while len(made) < len(works):
        for number, work in enumerate(works):
            try:
                if number not in made:
                    next(work)
            except StopIteration as end:
                made[number] = end.value
        given_up.close()
    for number, picture in made.items():
        assert_close(picture, wanted[number])


def test_the_same_picture_gives_the_same_bits(loaded: Loaded):
    _, vision, encoder = loaded
    first, again = (finished(encoder.encode(vision.prepare(pixels_of(0)).passes)) for _ in range(2))
    assert np.array_equal(first.rows, again.rows)
