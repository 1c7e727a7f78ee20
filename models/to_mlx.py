"""From the values that checkpoints hold to MLX's arrays, and back. Thread: the MLX thread."""

from dataclasses import dataclass

import ml_dtypes
import mlx.core as mx
import numpy as np

from models.quantization import Array, Packed, QuantizationSpec, logical_shape


@dataclass(frozen=True, slots=True)
class PackedArrays:
    """A `Packed` matrix in MLX's arrays: the same parts of the same shapes and types."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    spec: QuantizationSpec
    global_scale: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        return logical_shape(self.spec, self.weight.shape)


def to_mlx(value: Array) -> mx.array:
    """A copy of an array. Bfloat16 stays so; what MLX has no type for (8-bit floats) comes as its bytes, in uint8.

    Shapes: any; returns the same.
    """
    if value.dtype == ml_dtypes.bfloat16:
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    if value.dtype.kind == "V":
        value = value.view(np.uint8)
    return mx.array(value)


def from_mlx(array: mx.array) -> Array:
    """Wait for an array and copy it. Shapes: any; returns the same, of the same type."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def packed_to_mlx(packed: Packed) -> PackedArrays:
    """A copy of a quantised matrix."""
    return PackedArrays(
        to_mlx(packed.weight),
        to_mlx(packed.scales),
        to_mlx(packed.biases) if packed.biases is not None else None,
        packed.spec,
        to_mlx(packed.global_scale) if packed.global_scale is not None else None,
    )


def packed_from_mlx(packed: PackedArrays) -> Packed:
    """Wait for a quantised matrix and copy it."""
    return Packed(
        from_mlx(packed.weight),
        from_mlx(packed.scales),
        from_mlx(packed.biases) if packed.biases is not None else None,
        packed.spec,
        from_mlx(packed.global_scale) if packed.global_scale is not None else None,
    )


def dequantized(packed: PackedArrays, dtype: mx.Dtype) -> mx.array:
    """The dense matrix. Scales go through float32, so that a half-precision scale costs no precision of its own.

    Shapes: returns `packed.shape`, lazy.
    """
    spec = packed.spec
    affine = spec.mode == "affine"
    dense = mx.dequantize(
        packed.weight,
        packed.scales.astype(mx.float32) if affine else packed.scales,
        packed.biases.astype(mx.float32) if packed.biases is not None else None,
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )
    if packed.global_scale is not None:
        dense = dense * packed.global_scale.astype(mx.float32).reshape(())
    return dense.astype(dtype)
