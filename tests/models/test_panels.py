import mlx.core as mx
import numpy as np
import pytest

from models.backend import few_rows_library
from models.gemm import Gemm, few_rows_gemm
from models.panels import PANEL, PanelMatrix, PanelProducts


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("outputs", [1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_a_product_is_numpys(gemm: Gemm, rows: int, outputs: int):
    x, weight, out = draw(rows, 37), draw(outputs, 37), np.full((rows, outputs), np.nan, np.float32)
    products, matrix = PanelProducts(gemm), PanelMatrix(mx.array(weight))
    products.multiply(x, matrix, out)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-5)
    products.multiply(x, matrix, out, accumulate=True)
    np.testing.assert_allclose(out, 2 * (x @ weight.T), rtol=1e-5, atol=1e-5)


def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(gemm: Gemm):
    x, weight, out = draw(3, 50)[:, 10:47], draw(40, 37), np.zeros((3, 60), np.float32)
    PanelProducts(gemm).multiply(x, PanelMatrix(mx.array(weight)), out[:, 5:45])
    np.testing.assert_allclose(out[:, 5:45], x @ weight.T, rtol=1e-5, atol=1e-5)
    assert not out[:, :5].any()
    assert not out[:, 45:].any()


def test_one_after_the_other_finds_its_own_shape(gemm: Gemm):
    products = PanelProducts(gemm)
    for rows, outputs, inputs in ((1, 40, 8), (2, 40, 8), (1, 64, 8), (1, 40, 9), (1, 40, 8)):
        x, weight, out = draw(rows, inputs), draw(outputs, inputs), np.empty((rows, outputs), np.float32)
        products.multiply(x, PanelMatrix(mx.array(weight)), out)
        np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [5, PANEL, 100])
def test_rows_of_the_weight_come_back_as_they_were(outputs: int):
    weight = draw(outputs, 9)
    ids = np.array([0, outputs - 1, outputs // 2, 0])
    np.testing.assert_array_equal(PanelMatrix(mx.array(weight)).rows(ids), weight[ids])
    assert PanelMatrix(mx.array(weight)).rows(ids[:0]).shape == (0, 9)


def test_a_row_is_the_same_to_the_last_bit_however_many_there_are():
    gemm = few_rows_gemm()
    if gemm is None or few_rows_library() is None:
        pytest.skip("no BLAS here of which that is known")
    x, matrix = draw(16, 576), PanelMatrix(mx.array(draw(200, 576)))
    together = np.empty((16, 200), np.float32)
    products = PanelProducts(gemm)
    products.multiply(x, matrix, together)
    for count in range(1, 16):
        out = np.empty((count, 200), np.float32)
        products.multiply(x[:count], matrix, out)
        np.testing.assert_array_equal(out, together[:count])
