import numpy as np

from models.ops import PositionScale


def test_a_factor_grows_by_the_logarithm_of_the_periods_that_are_over():
    factors = PositionScale(beta=0.5, period=4, shift=1).factors(np.array([0, 2, 3, 6, 7, 11]))
    assert (factors.shape, factors.dtype) == ((6, 1), np.float32)
    expected = 1 + 0.5 * np.log([1, 1, 2, 2, 3, 4])
    np.testing.assert_allclose(factors[:, 0], expected, rtol=1e-6)


def test_a_positions_factor_does_not_depend_on_how_many_there_are():
    scale = PositionScale(beta=0.1, period=3)
    whole = scale.factors(np.arange(1000))
    for length in (1, 3, 7, 17, 33):
        np.testing.assert_array_equal(scale.factors(np.arange(500, 500 + length)), whole[500 : 500 + length])
