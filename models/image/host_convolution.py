"""The autoencoder's operations on numpy arrays, for CPUs: what MLX's CPU backend does twice as slowly as torch.

A convolution goes over the picture in blocks of tiles that stay in the processor's cache from the input's norm and SiLU
through the transform (`winograd`), the products and the transform back, to the sum with bias and residual. Blocks are
shared by a `Crew`. So the picture itself is read and written once a convolution, and nothing of its size is in between.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from models.image.feature_map import FeatureMap, Floats, Halves, narrow, widened
from models.image.gemm import SHARES, Crew, chunks
from models.image.winograd import Transform

TILES = 64
"""A block has at most so many tiles: enough rows for the BLAS, few enough for the cache."""

STRIP_FLOATS = 1 << 17
"""About so much of a picture is gone over at once where there are no tiles."""

EPSILON = 1e-6
"""Added to the variance in every norm."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A convolution's weights."""

    matrices: Floats
    """(taps, I, O), a matrix for each place of the kernel, row by row."""
    bias: Floats


@dataclass(frozen=True, slots=True)
class Affine:
    """What a norm comes to once the picture's statistics are known: x * scale + shift. Shapes: (C,)."""

    scale: Floats
    shift: Floats


@dataclass(frozen=True, slots=True)
class Moments:
    """The statistics of a picture's groups of channels. Shapes: (groups,)."""

    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    def affine(self, weight: Floats, bias: Floats) -> Affine:
        """What a norm with these weights comes to. Shapes: (C,)."""
        each = len(weight) // len(self.mean)
        scale = np.repeat(1.0 / np.sqrt(self.variance + EPSILON), each) * weight
        shift = bias - np.repeat(self.mean, each) * scale
        return Affine(scale.astype(np.float32), shift.astype(np.float32))


@dataclass(frozen=True, slots=True)
class _Block:
    """Some tiles of one picture: rows and columns of the grid of tiles."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class Tally:
    """Gathers the statistics of a picture, piece by piece.

    Each strip is centred by itself before it is squared, and strips are joined in float64: no cancellation.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._strips: list[tuple[int, Floats, Floats]] = []
        """Of each strip: pixels, each channel's mean, and its sum of squares about that. Shapes: (C,)."""

    def add(self, x: FeatureMap, rows: slice | None = None) -> None:
        """Take in some rows of `x`, or all."""
        rows = slice(0, x.height) if rows is None else rows
        size = max(1, STRIP_FLOATS // (x.width * x.channels))
        strips = [
            slice(rows.start + part.start, rows.start + part.stop) for part in chunks(rows.stop - rows.start, size)
        ]
        most = max(strip.stop - strip.start for strip in strips) * x.width
        scratch = np.empty((self._crew.size, most, x.channels), np.float32)
        ones = np.ones((1, most), np.float32)

        def measure(worker: int, strip: slice) -> None:
            values = x.matrix(strip)
            count = len(values)
            centred = scratch[worker, :count]
            mean, square = np.empty((2, 1, x.channels), np.float32)
            self._crew.gemm.multiply(ones[:, :count], values, mean)
            mean /= count
            np.subtract(values, mean, out=centred)
            np.square(centred, out=centred)
            self._crew.gemm.multiply(ones[:, :count], centred, square)
            measured[strip.start] = (count, mean[0], square[0])

        measured: dict[int, tuple[int, Floats, Floats]] = {}
        self._crew.share(measure, strips)
        # In the picture's order, whichever worker came first: the same sums every time.
        self._strips.extend(measured[strip.start] for strip in strips)

    def moments(self, groups: int) -> Moments:
        """Of `groups` of neighbouring channels over all that was added."""
        counts = np.array([[count] for count, _, _ in self._strips], np.float64)
        means = np.array([mean for _, mean, _ in self._strips], np.float64)
        squares = np.array([square for _, _, square in self._strips], np.float64)
        # Of each channel over the strips, then of each group over its channels.
        total = counts.sum()
        mean = (counts * means).sum(axis=0) / total
        square = (squares + counts * (means - mean) ** 2).sum(axis=0)
        mean, square = mean.reshape(groups, -1), square.reshape(groups, -1)
        group_mean = mean.mean(axis=1, keepdims=True)
        variance = (square / total + (mean - group_mean) ** 2).mean(axis=1)
        return Moments(group_mean[:, 0], variance)


@dataclass(frozen=True, slots=True)
class Planes:
    """A convolution's weights as `Convolver` multiplies them."""

    stack: Floats
    """(P, I, O)"""
    bias: Floats


class Convolver:
    """Runs 3 x 3 convolutions of one kind. Owns nothing but scratch memory while it runs."""

    def __init__(self, crew: Crew, transform: Transform) -> None:
        self._crew = crew
        self._transform = transform

    def planes(self, kernel: Kernel) -> Planes:
        """Transform a 3 x 3 kernel. Made anew for each picture: it is up to 11 times as large."""
        taps, inputs, outputs = kernel.matrices.shape
        made = np.empty((self._transform.planes, inputs, outputs), np.float32)
        flat, result = kernel.matrices.reshape(taps, -1), made.reshape(len(made), -1)

        def transform(_: int, part: slice) -> None:
            self._crew.gemm.multiply(self._transform.kernels, flat[:, part], result[:, part])

        self._crew.share(transform, chunks(inputs * outputs, 1 << 14))
        return Planes(made, kernel.bias)

    def __call__(
        self,
        x: FeatureMap,
        kernel: Kernel | Planes,
        affine: Affine | None = None,
        *,
        onto: FeatureMap | None = None,
        half: bool = False,
    ) -> FeatureMap:
        """Convolve SiLU(x * scale + shift), or x itself where there is no `affine`.

        Shapes: x (H, W, I); returns (H', W', O).

        Args:
            x: a picture.
            kernel: the weights.
            affine: scale and shift.
            onto: what the result is added to, in its place; None makes a new map.
            half: whether that is held in bfloat16.
        """
        planes = self.planes(kernel) if isinstance(kernel, Kernel) else kernel
        transform, channels = self._transform, planes.stack.shape[2]
        # A window's new inputs become a tile's outputs.
        height, width = (side * transform.tile // transform.step for side in (x.height, x.width))
        out = FeatureMap.empty(height, width, channels, half=half) if onto is None else onto
        blocks = _blocks(-(-height // transform.tile), -(-width // transform.tile), SHARES)
        workspaces = [_Workspace(transform, blocks, x.channels, channels) for _ in range(self._crew.size)]
        halved = None if affine is None else Affine(affine.scale * np.float32(0.5), affine.shift * np.float32(0.5))

        def convolve(worker: int, block: _Block) -> None:
            space = workspaces[worker].of(block)
            space.read(x, halved)
            self._crew.gemm.multiply(transform.inputs, space.tiles, space.planes)
            tiles, outputs = space.stacks
            self._crew.gemm.multiply_stacks(tiles, planes.stack, outputs)
            self._crew.gemm.multiply(transform.outputs, space.products, space.results)
            space.write(out, planes.bias, accumulate=onto is not None)

        self._crew.share(convolve, blocks)
        return out


class _Workspace:
    """One worker's memory: two buffers that take turns, each result overwriting what its predecessor was made from."""

    def __init__(self, transform: Transform, blocks: list[_Block], inputs: int, outputs: int) -> None:
        self._transform = transform
        self._inputs, self._outputs = inputs, outputs
        here = there = 0
        for block in blocks:
            tiles = block.shape[0] * block.shape[1]
            here = max(here, 2 * self._window_floats(block), transform.planes * tiles * inputs)
            here = max(here, transform.tile**2 * tiles * outputs)
            there = max(there, tiles * transform.window**2 * inputs, transform.planes * tiles * outputs)
        self._here, self._there = np.empty(here, np.float32), np.empty(there, np.float32)
        self._block = blocks[0]

    def of(self, block: _Block) -> "_Workspace":
        """Go on to that block."""
        self._block = block
        return self

    @property
    def tiles(self) -> Floats:
        """What `read` has read, (window ** 2, tiles * I)."""
        return self._flat(self._there, self._transform.window**2, self._inputs)

    @property
    def planes(self) -> Floats:
        """The tiles transformed, (P, tiles * I)."""
        return self._flat(self._here, self._transform.planes, self._inputs)

    @property
    def products(self) -> Floats:
        """The planes multiplied, (P, tiles * O)."""
        return self._flat(self._there, self._transform.planes, self._outputs)

    @property
    def stacks(self) -> tuple[Floats, Floats]:
        """`planes` and `products` as stacks of matrices, (P, tiles, I) and (P, tiles, O)."""
        count = self._transform.planes
        return self.planes.reshape(count, -1, self._inputs), self.products.reshape(count, -1, self._outputs)

    @property
    def results(self) -> Floats:
        """The outputs, (tile ** 2, tiles * O)."""
        return self._flat(self._here, self._transform.tile**2, self._outputs)

    def read(self, x: FeatureMap, halved: Affine | None) -> None:
        """Cut the block's tiles out of the picture, behind norm and SiLU if there are any; zeros around the picture.

        `halved` are half of scale and shift: silu(2h) = h + h * tanh(h).
        """
        height, width = self._window_shape(self._block)
        window, scratch = (
            self._here[start : start + height * width * self._inputs].reshape(height, width, self._inputs)
            for start in (0, self._window_floats(self._block))
        )
        top, left = self._origin(self._block)
        rows, columns = slice(max(top, 0), min(top + height, x.height)), slice(max(left, 0), min(left + width, x.width))
        own = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        source, target, tanh = x.data[rows, columns], window[own], scratch[own]
        if target.shape != window.shape:
            window.fill(0.0)
        if x.half:
            source = widened(cast("Halves", source), target)
        if halved is None:
            if not x.half:
                target[...] = source
        else:
            np.multiply(source, halved.scale, out=target)
            target += halved.shift
            np.tanh(target, out=tanh)
            tanh += np.float32(1.0)
            target *= tanh
        size, step, (down, across) = self._transform.window, self._transform.step, self._block.shape
        by_row, by_column, by_channel = window.strides
        view = as_strided(
            window,
            (size, size, down, across, self._inputs),
            (by_row, by_column, step * by_row, step * by_column, by_channel),
        )
        self.tiles.reshape(view.shape)[...] = view

    def write(self, out: FeatureMap, bias: Floats, *, accumulate: bool) -> None:
        """Put the outputs into the picture, or add them to it."""
        tile, (down, across) = self._transform.tile, self._block.shape
        results = self.results.reshape(tile, tile, down, across, self._outputs)
        top, left = self._block.rows.start * tile, self._block.columns.start * tile
        target = out.data[top : top + down * tile, left : left + across * tile]
        view = target.reshape(down, tile, across, tile, self._outputs).transpose(1, 3, 0, 2, 4)
        if out.half:
            results += bias
            if accumulate:
                results += widened(cast("Halves", view))
            narrow(results, cast("Halves", view))
        elif accumulate:
            results += bias
            view += results
        else:
            np.add(results, bias, out=view)

    def _origin(self, block: _Block) -> tuple[int, int]:
        """Where in the picture the block's window begins: its row and column, which may be -1."""
        step, before = self._transform.step, self._transform.before
        return block.rows.start * step - before, block.columns.start * step - before

    def _window_shape(self, block: _Block) -> tuple[int, int]:
        rows, columns = ((count - 1) * self._transform.step + self._transform.window for count in block.shape)
        return rows, columns

    def _window_floats(self, block: _Block) -> int:
        rows, columns = self._window_shape(block)
        return rows * columns * self._inputs

    def _flat(self, buffer: Floats, planes: int, channels: int) -> Floats:
        down, across = self._block.shape
        return buffer[: planes * down * across * channels].reshape(planes, -1)


def _blocks(down: int, across: int, workers: int) -> list[_Block]:
    """A grid of tiles in blocks of at most TILES, and one for each worker at least where there are enough.

    As square as may be: a block reads a margin around it once more.
    """
    tiles = max(1, min(TILES, down * across // workers))
    columns = chunks(across, max(math.isqrt(tiles), tiles // down))
    rows = chunks(down, max(1, tiles // max(part.stop - part.start for part in columns)))
    return [_Block(row, column) for row in rows for column in columns]


def project(crew: Crew, x: FeatureMap, kernel: Kernel, *, half: bool = False) -> FeatureMap:
    """A 1 x 1 convolution. Shapes: x (H, W, I); returns (H, W, O)."""
    (matrix,) = kernel.matrices
    out = FeatureMap.empty(x.height, x.width, matrix.shape[1], half=half)

    def multiply(_: int, rows: slice) -> None:
        inputs = x.matrix(rows)
        result = np.empty((len(inputs), out.channels), np.float32)
        crew.gemm.multiply(inputs, matrix, result)
        result += kernel.bias
        store(result.reshape(-1, x.width, out.channels), out, rows)

    crew.share(multiply, chunks(x.height, max(1, STRIP_FLOATS // (x.width * x.channels))))
    return out


def store(values: Floats, out: FeatureMap, rows: slice) -> None:
    """Put values into some rows; they may be overwritten. Shapes: (rows, W, C)."""
    target = out.data[rows, : out.width]
    if out.half:
        narrow(values, cast("Halves", target))
    else:
        target[...] = values
