"""Matrices as MLX holds them: their rows, their products, and the types of both."""

import mlx.core as mx
import numpy as np
import pytest

from models.executors.mlx.weights import DenseMatrix, QuantizedMatrix, SideBySide, Weights
from models.ops import Embedding, Joined, Linear, Norm, Vector
from models.quantization import Packed, QuantizationSpec, dequantize
from models.to_mlx import from_mlx

SPECS = (
    QuantizationSpec("affine", 4, 32),
    QuantizationSpec("mxfp4", 4, 32),
    QuantizationSpec("nvfp4", 4, 16),
    QuantizationSpec("mxfp8", 8, 32),
)
TABLE = Embedding("table", 24, 64)


def packed(rows: int, spec: QuantizationSpec, seed: int = 0, *, scaled: bool = False) -> Packed:
    dense = mx.array(np.random.default_rng(seed).normal(0, 1, (rows, 64)).astype(np.float32))
    parts = mx.quantize(dense, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    weight, scales, *biases = (from_mlx(part) for part in parts)
    return Packed(weight, scales, biases[0] if biases else None, spec, np.array([0.5], np.float32) if scaled else None)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.mode)
def test_a_quantised_table_gives_rows_and_products_in_the_type_that_is_computed_in(
    spec: QuantizationSpec, dtype: mx.Dtype, scaled: bool
):
    value, weights = packed(24, spec, scaled=scaled), Weights()
    weights.add(TABLE, {"table.weight": value}, "keep", dtype)
    table, dense = weights.table(TABLE), dequantize(value)
    assert isinstance(table, QuantizedMatrix)
    rows = table.rows(mx.array([3, 0, 23]))
    assert rows.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 4e-2
    np.testing.assert_allclose(from_mlx(rows.astype(mx.float32)), dense[[3, 0, 23]], rtol=0, atol=tolerance)
    product = table.multiply(mx.ones((2, 64), dtype=dtype))
    assert product.dtype == dtype
    np.testing.assert_allclose(from_mlx(product.astype(mx.float32))[1], dense.sum(-1), rtol=0, atol=16 * tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_matrices_of_one_input_are_one_where_they_are_held_alike(bias: bool):
    joined = Joined(tuple(Linear(name, 64, rows, bias) for name, rows in (("q", 32), ("k", 8), ("v", 8))))
    affine, mx4 = SPECS[0], SPECS[1]
    biases = {f"{part.name}.bias": np.full(part.outputs, 0.5, np.float32) for part in joined.parts if bias}

    def held(*kinds: object) -> tuple[type, np.ndarray, np.ndarray]:
        tensors = dict(biases)
        for part, kind in zip(joined.parts, kinds, strict=True):
            value = packed(part.outputs, affine if kind is None else kind, seed=part.outputs)
            tensors[f"{part.name}.weight"] = dequantize(value) if kind is None else value
        weights = Weights()
        weights.add(joined, tensors, "keep", mx.float32)
        matrix = weights.matrix(joined)
        dense = [
            value if isinstance(value, np.ndarray) else dequantize(value)
            for value in (tensors[f"{part.name}.weight"] for part in joined.parts)
        ]
        expected = np.concatenate(dense).sum(-1) + 0.5 * bias
        return type(matrix), from_mlx(matrix.multiply(mx.ones((1, 64))))[0], expected

    for kinds, kind in (
        ((None, None, None), DenseMatrix),
        ((affine, affine, affine), QuantizedMatrix),
        ((affine, affine, mx4), SideBySide),
        ((affine, None, affine), SideBySide),
    ):
        found, product, expected = held(*kinds)
        assert found is kind
        np.testing.assert_allclose(product, expected, rtol=0, atol=1e-4)


def test_numbers_of_heads_and_experts_are_not_rounded_where_norms_are():
    weights, values = Weights(), np.linspace(1, 2, 6, dtype=np.float32).reshape(6, 1)
    weights.add(Vector("a_log", 6), {"a_log": values}, "keep", mx.bfloat16)
    weights.add(Norm("norm", 6, 1e-6), {"norm.weight": values[:, 0]}, "keep", mx.bfloat16)
    held = weights.vector(Vector("a_log", 6))
    np.testing.assert_array_equal(from_mlx(held), values[:, 0])
    assert (held.dtype, weights.norm(Norm("norm", 6, 1e-6)).dtype) == (mx.float32, mx.bfloat16)
