"""Patch embeddings: products with whole patches, which are stored as the convolutions that they are as well."""

import numpy as np

from models.ops.weights import Linear
from models.quantization import Array, Tensor, dequantize


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How MLX's converters store a convolution of the shape (outputs, channels, …): (outputs, …, channels)."""
    return (shape[0], *shape[2:], shape[1])


def as_matrix(linear: Linear, value: Tensor) -> Tensor:
    """A matrix (outputs, inputs) as it is declared, from what is stored. Thread: any.

    Inputs are in the order (channels, [frames,] height, width) whichever way it is stored; a matrix stays as it is.
    """
    if not linear.axes:
        return value
    dense: Array = value if isinstance(value, np.ndarray) else dequantize(value)
    wanted = (linear.outputs, *linear.axes)
    if dense.shape != wanted:
        dense = np.moveaxis(dense, -1, 1)
    return np.ascontiguousarray(dense).reshape(linear.outputs, linear.inputs)
