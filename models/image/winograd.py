"""3 x 3 convolutions by few multiplications: tiles of a picture, and kernels, as planes that are multiplied one by one.

Sources: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, arXiv:1509.09308.
In one dimension m outputs of a kernel with r taps are A ((G g) * (B d)) for m + r - 1 inputs d; in two, the matrices
are Kronecker products with themselves. The points of evaluation below were searched for the least float32 error:
1.0e-6 of the result's deviation over 128 channels, where the sum of products itself has 0.3e-6 and the customary
points (0, 1, -1, 2, -2) have 3.1e-6.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

FOUR_BY_THREE = (0.0, 0.65, -0.65, 1.5, -1.5)
"""Points for 4 outputs and 3 taps; infinity is one more."""

FOUR_BY_TWO = (0.4, -0.4, 1.3, -1.3)
"""Points for 4 outputs and 2 taps."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One kind of 3 x 3 convolution, tile by tile. P planes are multiplied for a tile."""

    window: int
    """A tile's inputs are a square of so many."""
    step: int
    """From one tile's inputs to the next one's."""
    before: int
    """How many inputs the first tile's window begins before the picture."""
    tile: int
    """A tile's outputs are a square of so many."""
    inputs: npt.NDArray[np.float32]
    """(P, window ** 2)"""
    kernels: npt.NDArray[np.float32]
    """(P, 9)"""
    outputs: npt.NDArray[np.float32]
    """(tile ** 2, P)"""

    @property
    def planes(self) -> int:
        """P."""
        return len(self.inputs)


def plain() -> Transform:
    """Stride 1, zeros around. 2.25 products an output and channel instead of 9."""
    a, g, b = _toom_cook(FOUR_BY_THREE, 4, 3)
    return _squared(a, g, b, step=4, before=1)


def upsampling() -> Transform:
    """Each input four times, then as `plain`: 1.56 products an output and channel.

    Even outputs see the input before and their own, odd ones their own and the next; the kernel's taps that fall on one
    input are added up. Both halves are convolutions with 2 taps.
    """
    a, g, b = _toom_cook(FOUR_BY_TWO, 4, 2)
    points, inputs = b.shape
    outputs = np.zeros((8, 2 * points))
    outputs[0::2, :points], outputs[1::2, points:] = a, a
    windows = np.zeros((2 * points, inputs + 1))
    windows[:points, :inputs], windows[points:, 1:] = b, b
    even, odd = np.array([[1, 0, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 0, 1]])
    return _squared(outputs, np.concatenate([g @ even, g @ odd]), windows, step=4, before=1)


def downsampling() -> Transform:
    """Stride 2, zeros right and below only. 5.06 products an output and channel instead of 9.

    The outer taps fall on even inputs, a convolution with 2 taps; the middle one on odd inputs, which is left as it is.
    """
    a, g, b = _toom_cook(FOUR_BY_TWO, 4, 2)
    points, evens = b.shape
    windows = np.zeros((points + 4, 2 * evens - 1))
    windows[:points, 0::2], windows[points:, 1::2] = b, np.eye(4)
    kernels = np.zeros((points + 4, 3))
    kernels[:points, 0::2], kernels[points:, 1] = g, 1.0
    return _squared(np.concatenate([a, np.eye(4)], axis=1), kernels, windows, step=8, before=0)


def _toom_cook(points: tuple[float, ...], outputs: int, taps: int) -> tuple[Float64, Float64, Float64]:
    """A, G and B for one dimension, with infinity as the last point.

    Shapes: for n = outputs + taps - 1: (outputs, n), (n, taps), (n, n).
    """
    n = outputs + taps - 1
    assert len(points) == n - 1
    at = np.array(points)
    a, g, b = np.zeros((outputs, n)), np.zeros((n, taps)), np.zeros((n, n))
    for j, point in enumerate(at):
        others = np.delete(at, j)
        a[:, j] = point ** np.arange(outputs)
        g[j] = point ** np.arange(taps) / np.prod(point - others)
        b[j, : n - 1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1.0
    b[-1] = np.poly(at)[::-1]
    return a, g, b


def _squared(a: Float64, g: Float64, b: Float64, *, step: int, before: int) -> Transform:
    """From one dimension to two."""
    inputs, kernels, outputs = (np.ascontiguousarray(np.kron(m, m), dtype=np.float32) for m in (b, g, a))
    return Transform(b.shape[1], step, before, a.shape[0], inputs, kernels, outputs)
