"""A decoder's layers on numpy arrays: what is fast on a CPU with a BLAS.

A node of MLX's graph costs microseconds and its element-wise kernels are slow. Here a step is products of the BLAS and
numpy's kernels, in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.gemm import Gemm, Matrix
from models.llm.base import Row
from models.nn.decoder import DecoderConfig
from models.nn.host_attention import HostAttention
from models.panels import PanelMatrix, PanelProducts

Rotations = npt.NDArray[np.complex64]


@dataclass(frozen=True, slots=True)
class HostLayer:
    """One layer's weights as `models.nn.fused` prepares them; H heads and K key-value heads, of dimension d."""

    qkv: PanelMatrix
    """((H + 2K) * d, D)"""
    qkv_bias: Matrix | None
    qk_norm: Matrix | None
    """(H + K, d): each head's norm weight."""
    output: PanelMatrix
    output_bias: Matrix | None
    gate_up: PanelMatrix
    """(2F, D)"""
    gate_up_bias: Matrix | None
    down: PanelMatrix
    down_bias: Matrix | None


class HostStep:
    """Runs steps. Thread: the MLX thread."""

    def __init__(self, config: DecoderConfig, gemm: Gemm, layers: Sequence[HostLayer]) -> None:
        self._config = config
        self._gemm = gemm
        self._products = PanelProducts(gemm)
        self._layers = layers
        self._epsilon = np.float32(config.rms_norm_eps * config.hidden_size)
        self._head_epsilon = np.float32(config.rms_norm_eps * config.head_dim)

    def run(self, x: Matrix, rotations: Rotations, rows: Sequence[Row]) -> Iterator[Matrix]:
        """Yield the residual behind each layer: `x` itself, which is overwritten when the next one is asked for.

        Shapes: x (T, D), rotations (T, 1, d / 2); yields (T, D).
        """
        config, count, width = self._config, len(x), self._config.intermediate_size
        attention = HostAttention(self._gemm, config, rows)
        unit = np.empty_like(x)
        qkv = np.empty((count, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim), np.float32)
        attended = np.empty((count, config.num_heads * config.head_dim), np.float32)
        gate_up = np.empty((count, 2 * width), np.float32)
        for index, layer in enumerate(self._layers):
            self.unit(x, unit)
            self.product(unit, layer.qkv, qkv)
            if layer.qkv_bias is not None:
                qkv += layer.qkv_bias
            self._turn(qkv, layer.qk_norm, rotations)
            attention.attend(index, qkv, attended)
            self._plus_product(attended, layer.output, layer.output_bias, x)
            self.unit(x, unit)
            self.product(unit, layer.gate_up, gate_up)
            if layer.gate_up_bias is not None:
                gate_up += layer.gate_up_bias
            _swiglu(gate_up[:, :width], gate_up[:, width:])
            self._plus_product(gate_up[:, :width], layer.down, layer.down_bias, x)
            yield x

    def product(self, x: Matrix, matrix: PanelMatrix, out: Matrix) -> None:
        """Out = x @ matrix.T. Shapes: x (T, in), out (T, out)."""
        self._products.multiply(x, matrix, out)

    def unit(self, x: Matrix, out: Matrix) -> None:
        """Scale to a sum of squares of 1: RMSNorm without its weight and the square root of its width.

        Shapes: both (T, D).
        """
        np.multiply(x, 1.0 / np.sqrt(np.vecdot(x, x) + self._epsilon)[:, None], out=out)

    def _plus_product(self, x: Matrix, matrix: PanelMatrix, bias: Matrix | None, out: Matrix) -> None:
        self._products.multiply(x, matrix, out, accumulate=True)
        if bias is not None:
            out += bias

    def _turn(self, qkv: Matrix, norm: Matrix | None, rotations: Rotations) -> None:
        """Norm and rotate queries and keys in place. Shapes: qkv (T, (H + 2K) * d)."""
        config = self._config
        parts = qkv.reshape(len(qkv), -1, config.head_dim)
        turned = parts[:, : config.num_heads + config.num_kv_heads]
        if norm is not None:
            turned /= np.sqrt(np.vecdot(turned, turned) + self._head_epsilon)[:, :, None]
            turned *= norm
        pairs = turned.view(np.complex64)
        pairs *= rotations


def _swiglu(gate: Matrix, up: Matrix) -> None:
    """Gate = silu(gate) * up, with silu(g) = h + h * tanh(h), h = g / 2. Shapes: both (T, F)."""
    gate *= np.float32(0.5)
    scale = np.tanh(gate)
    scale += np.float32(1.0)
    gate *= scale
    gate *= up
