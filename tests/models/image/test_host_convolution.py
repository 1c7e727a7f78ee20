import numpy as np
import pytest

from models.image import winograd
from models.image.feature_map import FeatureMap, narrow
from models.image.gemm import Crew, host_gemm
from models.image.host_convolution import Affine, Convolver, Kernel, Tally, project


@pytest.fixture(scope="module")
def crew() -> Crew:
    gemm = host_gemm()
    assert gemm is not None
    return Crew(gemm)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


def make_map(picture: np.ndarray, *, half: bool = False) -> FeatureMap:
    """What lies outside the picture is not a number, so that nobody reads it unpunished."""
    made = FeatureMap.empty(*picture.shape, half=half)
    made.data[...] = 0x7FC0 if half else np.nan
    if half:
        narrow(picture.copy(), made.data[: made.height, : made.width])
    else:
        made.inside[...] = picture
    return made


def convolved(picture: np.ndarray, kernel: Kernel, stride: int = 1) -> np.ndarray:
    """By definition; zeros all around, or for stride 2 right and below only. Shapes: (H, W, I)."""
    before = 2 - stride
    padded = np.pad(picture.astype(np.float64), [(before, 1), (before, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))[::stride, ::stride]
    taps = kernel.matrices.reshape(3, 3, *kernel.matrices.shape[1:])
    return np.einsum("hwcij,ijco->hwo", windows, taps) + kernel.bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


SIZES = [(4, 4), (1, 1), (3, 21), (37, 5), (50, 70)]


@pytest.mark.parametrize("size", SIZES)
def test_a_convolution_is_what_it_is_by_definition_at_any_size(crew: Crew, size: tuple[int, int]):
    picture, kernel, affine = draw(*size, 5), Kernel(draw(9, 5, 3), draw(3)), Affine(draw(5), draw(5) + 1)
    with crew:
        out = Convolver(crew, winograd.plain())(make_map(picture), kernel, affine)
    expected = convolved(silu(picture * affine.scale + affine.shift), kernel)
    np.testing.assert_allclose(out.inside, expected, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_a_residual_is_added_in_place(crew: Crew, half: bool):
    picture, residual, kernel = draw(9, 10, 4), draw(9, 10, 6), Kernel(draw(9, 4, 6), draw(6))
    onto = make_map(residual, half=half)
    with crew:
        out = Convolver(crew, winograd.plain())(make_map(picture), kernel, onto=onto)
    assert out is onto
    expected = convolved(picture, kernel) + residual
    np.testing.assert_allclose(out.matrix(slice(0, 9)).reshape(9, 10, 6), expected, atol=1e-4 + 0.01 * 20 * half)


@pytest.mark.parametrize("size", SIZES)
def test_an_upsampler_sees_each_pixel_four_times(crew: Crew, size: tuple[int, int]):
    picture, kernel = draw(*size, 3), Kernel(draw(9, 3, 4), draw(4))
    with crew:
        out = Convolver(crew, winograd.upsampling())(make_map(picture), kernel)
    expected = convolved(picture.repeat(2, axis=0).repeat(2, axis=1), kernel)
    np.testing.assert_allclose(out.inside, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 2), (8, 30), (34, 10), (7, 9)])
def test_a_downsampler_pads_right_and_below_only(crew: Crew, size: tuple[int, int]):
    picture, kernel = draw(*size, 3), Kernel(draw(9, 3, 4), draw(4))
    with crew:
        out = Convolver(crew, winograd.downsampling())(make_map(picture), kernel)
    np.testing.assert_allclose(out.inside, convolved(picture, kernel, stride=2), atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_maps_in_bfloat16_are_read_and_written(crew: Crew, half: bool):
    picture, kernel = np.round(draw(12, 11, 4) * 8) / 8, Kernel(draw(9, 4, 6), draw(6))
    with crew:
        out = Convolver(crew, winograd.plain())(make_map(picture, half=True), kernel, half=half)
    assert out.half == half
    expected = convolved(picture, kernel)
    given = out.matrix(slice(0, 12)).reshape(expected.shape)
    np.testing.assert_allclose(given, expected, rtol=2**-8 if half else 0, atol=1e-3 if half else 1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_a_projection_is_a_product(crew: Crew, half: bool):
    picture, kernel = draw(9, 21, 5), Kernel(draw(1, 5, 3), draw(3))
    with crew:
        out = project(crew, make_map(picture), kernel, half=half)
    given = out.matrix(slice(0, 9)).reshape(9, 21, 3)
    np.testing.assert_allclose(given, picture @ kernel.matrices[0] + kernel.bias, rtol=2**-8 * half, atol=1e-4)


def test_statistics_are_exact_where_a_mean_is_far_from_zero(crew: Crew):
    """The naive mean of squares less the square of the mean would have no digit left."""
    picture = draw(90, 70, 6) * 0.01 + np.array([1000, 1000, -50, -50, 0, 3], np.float32)
    with crew:
        tally = Tally(crew)
        tally.add(make_map(picture), slice(0, 30))
        tally.add(make_map(picture), slice(30, 90))
    moments = tally.moments(3)
    groups = picture.astype(np.float64).reshape(-1, 3, 2)
    np.testing.assert_allclose(moments.mean, groups.mean(axis=(0, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.variance, groups.var(axis=(0, 2)), rtol=1e-4)


def test_a_norm_comes_to_a_scale_and_a_shift(crew: Crew):
    picture, weight, bias = draw(8, 8, 4) * 3 + 1, draw(4), draw(4) + 1
    with crew:
        tally = Tally(crew)
        tally.add(make_map(picture))
    affine = tally.moments(2).affine(weight, bias)
    groups = picture.astype(np.float64).reshape(-1, 2, 2)
    normed = (groups - groups.mean(axis=(0, 2), keepdims=True)) / groups.std(axis=(0, 2), keepdims=True)
    expected = normed.reshape(picture.shape) * weight + bias
    np.testing.assert_allclose(picture * affine.scale + affine.shift, expected, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same_picture(threads: int):
    gemm = host_gemm()
    assert gemm is not None
    before = gemm.threads
    picture, kernel = draw(64, 48, 8), Kernel(draw(9, 8, 8), draw(8))
    try:
        gemm.set_threads(threads)
        with Crew(gemm) as crew:
            out = Convolver(crew, winograd.plain())(make_map(picture), kernel)
        np.testing.assert_allclose(out.inside, convolved(picture, kernel), atol=1e-4)
    finally:
        gemm.set_threads(before)
