"""A model's weights as MLX holds them, by declaration."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import mlx.core as mx
import numpy as np

from models.executors.mlx.experts import HeldExperts, held_experts
from models.executors.mlx.matrices import DenseMatrix, Held, HeldMatrix, QuantizedMatrix, SideBySide, joined
from models.ops import Embedding, Experts, Joined, LatentUp, LayerNorm, Linear, Norm, ShortConv, Vector, Weight
from models.quantization import Array, Blocks, Packed, Tensor, dequantize
from models.sources.gguf_blocks import as_packed
from models.to_mlx import packed_to_mlx, to_mlx
from models.weights.latent import latent_matrices
from models.weights.patches import as_matrix

Policy: TypeAlias = Literal["keep", "float32"]


class Weights:
    """A model's weights by declaration. Thread: the executor's."""

    def __init__(self) -> None:
        self._matrices: dict[str, Held] = {}
        self._vectors: dict[str, mx.array] = {}
        self._experts: dict[str, HeldExperts] = {}
        self.nbytes = 0

    def add(self, weight: Weight, tensors: Mapping[str, Tensor], policy: Policy, dtype: mx.Dtype) -> None:
        """Hold a declared weight, from its tensors by name. Evaluates it."""
        if isinstance(weight, Norm | LayerNorm | Vector):
            for name, _ in weight.tensors():
                offset = 0.0 if isinstance(weight, Vector) or name.endswith(".bias") else weight.offset
                value = _dense(tensors[name]).astype(np.float32).reshape(-1) + np.float32(offset)
                # Rates are exponents, and biases decide choices: both are few, and not rounded.
                self._hold(name, mx.array(value), mx.float32 if isinstance(weight, Vector) else dtype)
            return
        if isinstance(weight, ShortConv):
            for name, _ in weight.tensors():
                self._hold(name, mx.array(_dense(tensors[name]).astype(np.float32)), dtype)
            return
        if isinstance(weight, LatentUp):
            for name, value in latent_matrices(weight, {name: _dense(tensors[name]) for name in tensors}).items():
                self._hold(name, mx.array(value.astype(np.float32)), dtype)
            return
        if isinstance(weight, Experts):
            held = held_experts(
                [
                    (
                        [_single(part, tensors, policy, dtype) for part in each.gate_up.parts],
                        _single(each.down, tensors, policy, dtype),
                    )
                    for each in weight.each
                ]
            )
            mx.eval(held.arrays())
            self.nbytes += sum(array.nbytes for array in held.arrays())
            self._experts[weight.each[0].down.name] = held
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

    def norm(self, weight: Norm) -> mx.array | None:
        """A norm's weight (width,); None: all of it is 1."""
        return self._vectors[f"{weight.name}.weight"] if weight.name else None

    def layer_norm(self, weight: LayerNorm) -> tuple[mx.array, mx.array | None]:
        """A norm's weight and bias, both (width,)."""
        return self._vectors[f"{weight.name}.weight"], self._vectors[f"{weight.name}.bias"] if weight.bias else None

    def vector(self, weight: Vector) -> mx.array:
        """A vector (width,)."""
        return self._vectors[weight.name]

    def convolution(self, weight: ShortConv) -> tuple[mx.array, mx.array | None]:
        """A convolution's taps (K, C) and bias (C,)."""
        taps = self._vectors[f"{weight.name}.weight"].reshape(weight.channels, weight.taps).T
        return taps, self._vectors[f"{weight.name}.bias"] if weight.bias else None

    def experts(self, weight: Experts) -> HeldExperts:
        """What is held of experts."""
        return self._experts[weight.each[0].down.name]

    def latent_up(self, weight: LatentUp) -> tuple[mx.array, mx.array]:
        """Each head's matrices. Shapes: keys (H, key_dim, rank), values (H, rank, value_dim)."""
        return self._vectors[f"{weight.name}.keys"], self._vectors[f"{weight.name}.values"]

    def _hold(self, name: str, value: mx.array, dtype: mx.Dtype) -> None:
        value = value.astype(dtype)
        mx.eval(value)
        self.nbytes += value.nbytes
        self._vectors[name] = value

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
    if isinstance(part, Linear):
        value = as_matrix(part, value)
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
