"""How bytes become numbers, by each of a processor's rules."""

import numpy as np
import pytest
from PIL import Image

from models.vision.processing import PixelRules

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.45, 0.5)


def rules(factor: float | None, mean: tuple[float, ...] | None) -> PixelRules:
    return PixelRules(Image.Resampling.BICUBIC, factor, mean, STD)


@pytest.mark.parametrize("factor", [None, 1 / 255])
@pytest.mark.parametrize("mean", [None, MEAN])
def test_what_is_not_asked_for_is_not_done(factor: float | None, mean: tuple[float, ...] | None):
    wanted = PIXELS * (1.0 if factor is None else factor)
    if mean is not None:
        wanted = (wanted - mean) / STD
    values = rules(factor, mean).values(PIXELS)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [None, MEAN])
def test_bytes_that_came_as_numbers_are_the_same_to_the_bit(mean: tuple[float, ...] | None):
    own = rules(1 / 255, mean)
    np.testing.assert_array_equal(own.values(PIXELS.astype(np.float32)), own.values(PIXELS))
