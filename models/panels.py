"""Weights cut into panels, for products of few rows with many columns: what decoding is.

A BLAS packs its second operand into blocks before it multiplies, and for a few rows packing takes longer than the
product. Panels as narrow as these are multiplied as they lie, in one call for all of a matrix, each by one thread; and
since an output is then one sum in the order of its inputs, it does not depend on how many rows there are, up to a
limit that lies with the BLAS (a million multiplications a panel in OpenBLAS).
"""

from functools import lru_cache, partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.gemm import Gemm, Matrix, ProductBatch, Products
from models.host import lend

PANEL = 32
"""Outputs of a panel: of 16 to 192, the fastest for 1 to 16 rows with OpenBLAS and with MKL (measured on AVX-512)."""
KEPT_PLANS = 256


class PanelMatrix:
    """A weight of N outputs and K inputs: panels (K, 32), contiguous, and a narrower one behind them."""

    __slots__ = ("_held", "_panels", "_rest", "address", "inputs", "outputs")

    def __init__(self, weight: mx.array) -> None:
        """Shapes: weight float32 (N, K); copied. Thread: the MLX thread."""
        self.outputs, self.inputs = weight.shape
        whole = self.outputs - self.outputs % PANEL
        given = lend(weight)
        # Memory of MLX, so that it counts as the model's.
        self._held = mx.zeros(weight.size)
        lent = lend(self._held)
        self.address = lent.ctypes.data
        self._panels = lent[: whole * self.inputs].reshape(-1, self.inputs, PANEL)
        self._rest = lent[whole * self.inputs :].reshape(self.inputs, -1)
        self._panels[...] = given[:whole].reshape(-1, PANEL, self.inputs).swapaxes(1, 2)
        self._rest[...] = given[whole:].T

    def rows(self, ids: npt.NDArray[np.integer]) -> Matrix:
        """Rows of the weight. Shapes: ids (T,); returns (T, K), a copy."""
        out = np.empty((len(ids), self.inputs), np.float32)
        panel, column = np.divmod(ids, PANEL)
        is_whole = panel < len(self._panels)
        out[is_whole] = self._panels[panel[is_whole], :, column[is_whole]]
        out[~is_whole] = self._rest[:, column[~is_whole]].T
        return out


class PanelProducts:
    """Multiplies rows by panel matrices. Thread: one at a time."""

    def __init__(self, gemm: Gemm) -> None:
        self._plan = lru_cache(maxsize=KEPT_PLANS)(partial(_Plan, gemm))

    def multiply(self, x: Matrix, matrix: PanelMatrix, out: Matrix, *, accumulate: bool = False) -> None:
        """Out = x @ weight.T, or out += it.

        Shapes: x (T, K), out (T, N); rows may lie apart, the elements of one may not.
        """
        assert x.shape[1] == matrix.inputs
        assert out.shape == (len(x), matrix.outputs)
        sizes = len(x), matrix.outputs, matrix.inputs
        plan = self._plan(sizes, x.strides[0] >> 2, out.strides[0] >> 2, accumulate=accumulate)
        plan.multiply(x.ctypes.data, matrix.address, out.ctypes.data)


class _Plan:
    """The products of one shape."""

    def __init__(
        self, gemm: Gemm, sizes: tuple[int, int, int], lead_x: int, lead_out: int, *, accumulate: bool
    ) -> None:
        rows, outputs, inputs = sizes
        panels, rest = divmod(outputs, PANEL)
        widths = [(count, width) for count, width in ((panels, PANEL), (1, rest)) if count and width]
        groups = [Products(count, rows, width, inputs, lead_x, width, lead_out) for count, width in widths]
        self._batch = ProductBatch(gemm, groups, accumulate=accumulate)
        panel = np.arange(panels + bool(rest), dtype=np.uint64)
        self._x = np.zeros_like(panel)
        self._panels = panel * np.uint64(4 * PANEL * inputs)
        self._out = panel * np.uint64(4 * PANEL)

    def multiply(self, x: int, panels: int, out: int) -> None:
        self._batch.multiply(self._x + np.uint64(x), self._panels + np.uint64(panels), self._out + np.uint64(out))
