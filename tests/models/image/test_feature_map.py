import numpy as np
import pytest

from models.image.feature_map import ALIGNMENT, FeatureMap, narrow, widened


def test_a_map_has_room_for_every_tile():
    made = FeatureMap.empty(9, 16, 5)
    assert made.data.shape == (2 * ALIGNMENT, 2 * ALIGNMENT, 5)
    assert (made.inside.shape, made.channels, made.half) == ((9, 16, 5), 5, False)
    # Sums run over what is outside, too; what memory happens to hold would make them warn.
    assert not made.data[9:].any()


def test_bfloat16_is_rounded_to_the_nearest():
    values = np.array([[1.0, 1.0 + 2**-8 + 2**-12, 1.0 + 2**-9, -3.0e38, 1e-30, 0.0]], np.float32)
    held = np.empty(values.shape, np.uint16)
    narrow(values.copy(), held)
    back = widened(held)
    np.testing.assert_allclose(back, values, rtol=2**-8)
    assert back[0, 1] == 1.0 + 2**-7
    assert (back[0, 0], back[0, 5]) == (1.0, 0.0)


def test_a_mean_is_not_moved_by_rounding():
    values = np.random.default_rng(0).uniform(1, 2, (64, 64)).astype(np.float32)
    held = np.empty(values.shape, np.uint16)
    narrow(values.copy(), held)
    assert abs(widened(held).mean() - values.mean()) < 2e-4


@pytest.mark.parametrize("half", [False, True])
def test_rows_are_read_as_float32(half: bool):
    picture = np.arange(3 * 10 * 2, dtype=np.float32).reshape(3, 10, 2)
    made = FeatureMap.empty(3, 10, 2, half=half)
    if half:
        narrow(picture.copy(), made.data[:3, :10])
    else:
        made.inside[...] = picture
    np.testing.assert_array_equal(made.matrix(slice(1, 3)), picture[1:].reshape(-1, 2))
    piece = made.rows(slice(1, 3))
    assert (piece.height, piece.width, piece.half) == (2, 10, half)
    np.testing.assert_array_equal(piece.matrix(slice(0, 2)), picture[1:].reshape(-1, 2))
