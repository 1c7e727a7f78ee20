"""Embedding tables: kept as the file has them, rows made float32 when they are looked up."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.quantization import Packed, Tensor, dequantize


class EmbeddingTable:
    """A table (rows, width). Thread: the executor's."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self._value)

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shapes: ids (T,); returns (T, width)."""
        value = self._value
        if isinstance(value, np.ndarray):
            return value[ids].astype(np.float32, copy=False)
        if isinstance(value, Packed):
            biases = None if value.biases is None else value.biases[ids]
            return dequantize(replace(value, weight=value.weight[ids], scales=value.scales[ids], biases=biases))
        return dequantize(replace(value, rows=value.rows[ids], shape=(len(ids), value.shape[1])))


def nbytes_of(value: Tensor) -> int:
    """The bytes of a tensor as it is stored."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    parts: list[Any] = [value.weight, value.scales, value.biases] if isinstance(value, Packed) else [value.rows]
    return sum(part.nbytes for part in parts if part is not None)
