"""Which reference pictures are refused, and what is looked at of the others."""

import numpy as np
import pytest

from models.image.base import PictureError
from models.image.flux2.references import check_references, prepare_reference, seen_size


def blank(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((63, 500), "images[1] is 63x500; both sides must be at least 64 pixels"),
        ((500, 10), "images[1] is 500x10; both sides"),
        ((64, 513), "images[1] is 64x513; the longer side must be at most 8 times the shorter"),
        ((1601, 200), "images[1] is 1601x200; the longer side"),
    ],
)
def test_a_picture_that_is_too_small_or_too_long_is_refused_by_its_place(size, words):
    with pytest.raises(PictureError) as caught:
        check_references([blank(64, 64), blank(*size)])
    assert words in str(caught.value)


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (512, 64), (5000, 4000)])
def test_a_picture_at_the_limits_is_taken(size):
    check_references([blank(*size)])


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((64, 64), (64, 64)),
        ((79, 95), (64, 80)),
        ((1024, 1024), (1024, 1024)),
        ((1040, 1024), (1024, 1008)),
        ((4000, 3000), (1168, 880)),
        ((8000, 1000), (2896, 352)),
    ],
)
def test_what_is_seen_of_a_picture_has_at_most_a_megapixel_and_whole_tokens(size, seen):
    assert seen_size(*size, 16) == seen
    assert prepare_reference(blank(*size), 16).shape == (seen[1], seen[0], 3)


def test_a_small_picture_loses_as_much_on_either_side():
    image = np.arange(70 * 67, dtype=np.uint32).reshape(70, 67, 1).repeat(3, axis=2).astype(np.uint8)
    np.testing.assert_array_equal(prepare_reference(image, 16), image[3:67, 1:65])


def test_a_large_picture_is_shrunk_and_not_cut():
    image = blank(2048, 2048)
    image[:1024] = 255
    prepared = prepare_reference(image, 16)
    assert prepared.shape == (1024, 1024, 3)
    assert (prepared[:500] == 255).all()
    assert (prepared[524:] == 0).all()
