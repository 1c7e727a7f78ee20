import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from models.quantization import Packed, QuantizationSpec
from models.to_mlx import from_mlx, packed_from_mlx, packed_to_mlx, to_mlx

TYPES = [
    (np.float32, mx.float32), (np.float16, mx.float16), (ml_dtypes.bfloat16, mx.bfloat16), (np.uint8, mx.uint8),
    (np.uint32, mx.uint32), (np.int64, mx.int64), (np.bool_, mx.bool_),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "mlx"), TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 2)])
def test_an_array_goes_there_and_back_in_its_type(ours: type, mlx: mx.Dtype, shape: tuple[int, ...]):
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(ours)
    array = to_mlx(value)
    assert (array.dtype, array.shape) == (mlx, shape)
    back = from_mlx(array)
    assert back.dtype == value.dtype
    assert np.array_equal(back, value)


def test_a_part_of_an_array_is_copied():
    value = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    array = to_mlx(value[:, 1:3])
    value[:] = 0
    assert array.tolist() == [[1, 2], [5, 6], [9, 10]]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu])
def test_floats_of_eight_bits_come_as_their_bytes(dtype: type):
    value = np.arange(6, dtype=np.uint8).reshape(2, 3)
    array = to_mlx(value.view(dtype))
    assert array.dtype == mx.uint8
    assert array.tolist() == value.tolist()


@pytest.mark.parametrize("with_global_scale", [True, False])
@pytest.mark.parametrize("with_biases", [True, False])
def test_a_packed_matrix_goes_there_and_back(with_global_scale: bool, with_biases: bool):
    spec = QuantizationSpec("affine", 4, 32)
    packed = Packed(
        np.arange(16, dtype=np.uint32).reshape(2, 8),
        np.ones((2, 2), ml_dtypes.bfloat16),
        np.zeros((2, 2), np.float16) if with_biases else None,
        spec,
        np.array([2.0], np.float32) if with_global_scale else None,
    )
    arrays = packed_to_mlx(packed)
    assert arrays.shape == packed.shape == (2, 64)
    back = packed_from_mlx(arrays)
    assert back.spec == spec
    for name in ("weight", "scales", "biases", "global_scale"):
        before, after = getattr(packed, name), getattr(back, name)
        assert (before is None) == (after is None)
        assert before is None or (before.dtype == after.dtype and np.array_equal(before, after))
