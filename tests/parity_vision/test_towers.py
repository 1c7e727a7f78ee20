"""What towers make of pictures, on every executor, against transformers."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

import numpy as np
import pytest

from models.checkpoint import JSON, Checkpoint, NamedTensor, Tensor, TensorInfo, open_checkpoint
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


@dataclass(frozen=True)
class ChannelsLast:
    """Implements `Checkpoint`: another one as MLX's converters write its convolutions."""

    inner: Checkpoint

    @property
    def reference(self) -> str:
        return self.inner.reference

    @property
    def config(self) -> Mapping[str, JSON]:
        return self.inner.config

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def read(self, name: str) -> bytes | None:
        return self.inner.read(name)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        for info in self.inner.infos(component):
            shape = info.shape
            yield replace(info, shape=(shape[0], *shape[2:], shape[1])) if len(shape) > 3 else info

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        convolutions = {info.name for info in self.inner.infos(component) if len(info.shape) > 3}
        for tensor in self.inner.tensors(component):
            moved = tensor.name in convolutions
            yield replace(tensor, read=partial(self._moved, tensor.read)) if moved else tensor

    @staticmethod
    def _moved(read: Callable[[], Tensor]) -> Tensor:
        value = read()
        assert isinstance(value, np.ndarray)
        return np.moveaxis(value, 1, -1)


def opened(name: str) -> Checkpoint:
    return open_checkpoint(str(HERE / name), HERE / "no-store")


def load_from(checkpoint: Checkpoint, kind: str, vision: Vision) -> PictureEncoder:
    if kind == "onnx":
        from models.executors.onnx import load_tower as load_onnx

        return load_onnx(checkpoint, vision.tower, threads=2)
    from models.executors.mlx import load_tower as load_mlx

    return load_mlx(checkpoint, vision.tower)


def load(name: str, kind: str, vision: Vision) -> PictureEncoder:
    return load_from(opened(name), kind, vision)


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


def test_a_convolution_with_its_channels_last_is_the_same(loaded: Loaded):
    name, vision, encoder = loaded
    kind = "onnx" if "onnx" in type(encoder).__module__ else "mlx"
    own = load_from(ChannelsLast(opened(name)), kind, vision)
    passes = vision.prepare(pixels_of(1)).passes
    assert np.array_equal(finished(own.encode(passes)).rows, finished(encoder.encode(passes)).rows)
    own.close()


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
