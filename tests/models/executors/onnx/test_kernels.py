"""What this processor's kernels are found to do, they do with other matrices too."""

import numpy as np
import pytest

from models.executors.onnx.kernels import EXACT, ROUNDED, quantized_product, treats_rows_alike

COUNTS = range(1, 18)


@pytest.mark.parametrize("size", [(256, 8), (576, 1536), (1536, 576)])
@pytest.mark.parametrize("level", [ROUNDED, EXACT])
@pytest.mark.parametrize(("bits", "block"), [(2, 64), (4, 16), (4, 32), (4, 64), (8, 16), (8, 32), (8, 64)])
def test_rows_are_alike_in_even_numbers_and_in_odd_ones_where_it_was_found(
    bits: int, block: int, level: int, size: tuple[int, int]
):
    multiply = quantized_product(bits, block, level, *size)
    x = np.random.default_rng(2).standard_normal((COUNTS[-1] + 1, size[0]), np.float32)
    together = multiply(x)
    differing = [count for count in COUNTS if not np.array_equal(multiply(x[:count]), together[:count])]
    assert not [count for count in differing if count % 2 == 0]
    assert not (differing and treats_rows_alike(bits, block, level))
