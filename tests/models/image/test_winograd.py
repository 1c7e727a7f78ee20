from collections.abc import Callable

import numpy as np
import pytest

from models.image import winograd
from models.image.winograd import Transform


def convolved(picture: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """By definition, without padding. Shapes: (H, W), (3, 3)."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (3, 3))[::stride, ::stride]
    return (windows * kernel).sum(axis=(2, 3))


def upsampled(window: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    # The first two inputs' outputs and the last two's would need more than the window.
    return convolved(window.repeat(2, axis=0).repeat(2, axis=1), kernel)[1:-1, 1:-1]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (winograd.plain, convolved),
        (winograd.upsampling, upsampled),
        (winograd.downsampling, lambda window, kernel: convolved(window, kernel, stride=2)),
    ],
)
def test_planes_multiplied_one_by_one_are_the_convolution(
    make: Callable[[], Transform], expected: Callable[[np.ndarray, np.ndarray], np.ndarray]
):
    transform = make()
    rng = np.random.default_rng(1)
    window, kernel = rng.normal(size=(transform.window, transform.window)), rng.normal(size=(3, 3))
    planes = (transform.inputs @ window.ravel()) * (transform.kernels @ kernel.ravel())
    tile = (transform.outputs @ planes).reshape(transform.tile, transform.tile)
    np.testing.assert_allclose(tile, expected(window, kernel), atol=2e-6)


def test_multiplications_are_as_few_as_promised():
    products = {make.__name__: (t := make()).planes / t.tile**2 for make in (winograd.plain, winograd.upsampling)}
    assert products == {"plain": 2.25, "upsampling": 1.5625}
    down = winograd.downsampling()
    assert down.planes / down.tile**2 == 81 / 16


def test_the_points_of_evaluation_lose_little_in_float32():
    """The customary points lose three times as much, and errors of thirty layers add up."""
    transform, channels, tiles = winograd.plain(), 64, 64
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(36, tiles * channels)).astype(np.float32)
    kernels = rng.normal(size=(9, channels * 8)).astype(np.float32)
    planes = (transform.inputs @ inputs).reshape(36, tiles, channels)
    products = planes @ (transform.kernels @ kernels).reshape(36, channels, 8)
    given = (transform.outputs @ products.reshape(36, -1)).reshape(4, 4, tiles, 8)
    squares, taps = inputs.astype(np.float64).reshape(6, 6, tiles, channels), kernels.reshape(3, 3, channels, 8)
    exact = sum(squares[i : i + 4, j : j + 4] @ taps[i, j].astype(np.float64) for i in range(3) for j in range(3))
    assert np.sqrt(np.mean((given - exact) ** 2)) < 2e-6 * np.std(exact)
