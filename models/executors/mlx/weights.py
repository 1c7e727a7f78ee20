"""Weights as MLX holds them: dense matrices, quantised ones as they are, and products with both.

Source: mlx v0.32 `mx.quantized_matmul` for the kinds of quantisation and their layouts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import mlx.core as mx
import numpy as np

from models.ops import Embedding, Joined, LayerNorm, Linear, Norm, Weight
from models.quantization import Array, Blocks, Packed, Tensor, dequantize
from models.sources.gguf_blocks import as_packed
from models.to_mlx import PackedArrays, packed_to_mlx, to_mlx

Policy: TypeAlias = Literal["keep", "float32"]


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A plain matrix. Shapes: values (N, K), bias (N,) or None."""

    values: mx.array
    bias: mx.array | None = None

    def multiply(self, x: mx.array) -> mx.array:
        """Shapes: x (T, K); returns (T, N)."""
        return x @ self.values.T if self.bias is None else mx.addmm(self.bias, x, self.values.T)

    def rows(self, ids: mx.array) -> mx.array:
        """Shapes: ids (T,); returns (T, K)."""
        return self.values[ids]

    def arrays(self) -> list[mx.array]:
        """What is held."""
        return [self.values] if self.bias is None else [self.values, self.bias]


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A quantised matrix (N, K), multiplied as it is."""

    packed: PackedArrays
    dtype: mx.Dtype
    """What its rows are dequantised to."""
    bias: mx.array | None = None

    def multiply(self, x: mx.array) -> mx.array:
        """Shapes: x (T, K); returns (T, N)."""
        packed = self.packed
        y = mx.quantized_matmul(
            x,
            packed.weight,
            packed.scales,
            packed.biases,
            transpose=True,
            group_size=packed.spec.group_size,
            bits=packed.spec.bits,
            mode=packed.spec.mode,
        )
        if packed.global_scale is not None:
            y = y * packed.global_scale.astype(y.dtype)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """Shapes: ids (T,); returns (T, K)."""
        packed = self.packed
        rows = mx.dequantize(
            packed.weight[ids],
            packed.scales[ids],
            None if packed.biases is None else packed.biases[ids],
            group_size=packed.spec.group_size,
            bits=packed.spec.bits,
            mode=packed.spec.mode,
            dtype=self.dtype,
        )
        return rows if packed.global_scale is None else rows * packed.global_scale.astype(rows.dtype)

    def arrays(self) -> list[mx.array]:
        """What is held."""
        packed = self.packed
        parts = (packed.weight, packed.scales, packed.biases, packed.global_scale, self.bias)
        return [part for part in parts if part is not None]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Matrices of one input that cannot be one, for they are held in different ways."""

    parts: tuple[DenseMatrix | QuantizedMatrix, ...]

    def multiply(self, x: mx.array) -> mx.array:
        """Shapes: x (T, K); returns (T, sum of N)."""
        return mx.concatenate([part.multiply(x) for part in self.parts], axis=-1)

    def arrays(self) -> list[mx.array]:
        """What is held."""
        return [array for part in self.parts for array in part.arrays()]


HeldMatrix: TypeAlias = DenseMatrix | QuantizedMatrix
Held: TypeAlias = DenseMatrix | QuantizedMatrix | SideBySide


class Weights:
    """A model's weights by declaration. Thread: the executor's."""

    def __init__(self) -> None:
        self._matrices: dict[str, Held] = {}
        self._vectors: dict[str, mx.array] = {}
        self.nbytes = 0

    def add(self, weight: Weight, tensors: Mapping[str, Tensor], policy: Policy, dtype: mx.Dtype) -> None:
        """Hold a declared weight, from its tensors by name. Evaluates it."""
        if isinstance(weight, Norm | LayerNorm):
            for name, _ in weight.tensors():
                vector = to_mlx(_dense(tensors[name])).astype(dtype)
                mx.eval(vector)
                self.nbytes += vector.nbytes
                self._vectors[name] = vector
            return
        matrix = self._made(weight, tensors, policy, dtype)
        mx.eval(matrix.arrays())
        self.nbytes += sum(array.nbytes for array in matrix.arrays())
        self._matrices[_key(weight)] = matrix

    def matrix(self, weight: Linear | Joined | Embedding) -> Held:
        """What is held of a matrix."""
        return self._matrices[_key(weight)]

    def table(self, weight: Embedding) -> HeldMatrix:
        """What is held of a table."""
        held = self._matrices[_key(weight)]
        assert not isinstance(held, SideBySide)
        return held

    def norm(self, weight: Norm) -> mx.array:
        """A norm's weight (width,)."""
        return self._vectors[f"{weight.name}.weight"]

    def layer_norm(self, weight: LayerNorm) -> tuple[mx.array, mx.array | None]:
        """A norm's weight (width,), and its bias (width,) if it has one."""
        return self._vectors[f"{weight.name}.weight"], self._vectors.get(f"{weight.name}.bias")

    def _made(
        self, weight: Linear | Joined | Embedding, tensors: Mapping[str, Tensor], policy: Policy, dtype: mx.Dtype
    ) -> Held:
        if isinstance(weight, Joined):
            return joined([_single(part, tensors, policy, dtype) for part in weight.parts])
        return _single(weight, tensors, policy, dtype)


def _key(weight: Linear | Joined | Embedding) -> str:
    return "+".join(part.name for part in weight.parts) if isinstance(weight, Joined) else weight.name


def _dense(value: Tensor) -> Array:
    return value if isinstance(value, np.ndarray) else dequantize(value)


def _single(part: Linear | Embedding, tensors: Mapping[str, Tensor], policy: Policy, dtype: mx.Dtype) -> HeldMatrix:
    value = tensors[f"{part.name}.weight"]
    bias = None
    if isinstance(part, Linear) and part.bias:
        bias = to_mlx(_dense(tensors[f"{part.name}.bias"])).astype(dtype)
    if isinstance(value, Blocks) and policy == "keep" and (repacked := as_packed(value)) is not None:
        value = repacked
    if isinstance(value, Packed) and policy == "keep":
        packed = packed_to_mlx(value)
        if packed.spec.mode == "affine":
            # The kernels compute in the type that inputs and scales have in common.
            biases = None if packed.biases is None else packed.biases.astype(dtype)
            packed = replace(packed, scales=packed.scales.astype(dtype), biases=biases)
        return QuantizedMatrix(packed, dtype, bias)
    return DenseMatrix(to_mlx(_dense(value)).astype(dtype), bias)


def joined(parts: Sequence[HeldMatrix]) -> Held:
    """Matrices of one input as one, where they are held alike."""
    bias = _joined_bias(parts)
    dense = [part.values for part in parts if isinstance(part, DenseMatrix)]
    if len(dense) == len(parts):
        return DenseMatrix(mx.concatenate(dense), bias)
    quantized = [part for part in parts if isinstance(part, QuantizedMatrix)]
    packed = [part.packed for part in quantized]
    alike = len({each.spec for each in packed}) == 1 and all(each.global_scale is None for each in packed)
    if len(packed) < len(parts) or not alike:
        return SideBySide(tuple(parts))
    biases = [each.biases for each in packed if each.biases is not None]
    whole = PackedArrays(
        mx.concatenate([each.weight for each in packed]),
        mx.concatenate([each.scales for each in packed]),
        mx.concatenate(biases) if len(biases) == len(packed) else None,
        packed[0].spec,
    )
    return QuantizedMatrix(whole, quantized[0].dtype, bias)


def _joined_bias(parts: Iterable[HeldMatrix]) -> mx.array | None:
    biases = [part.bias for part in parts if part.bias is not None]
    return mx.concatenate(biases) if biases else None
