"""The autoencoder's operations on numpy arrays, for CPUs: what MLX's CPU backend does twice as slowly as torch.

A convolution goes over the picture in blocks of tiles that stay in the processor's cache from the input's norm and SiLU
through the transform (`winograd`), the products and the transform back, to the sum with bias and residual. Blocks are
shared by a `Crew`. So the picture itself is read and written once a convolution, and nothing of its size is in between.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from models.gemm import Crew, chunks
from models.image.winograd import Transform

Floats: TypeAlias = npt.NDArray[np.float32]

ALIGNMENT = 8
"""Rows and columns are allocated in multiples of it, so that every tile of outputs has its place."""

TILES = 64
"""About so many tiles make a block: enough rows for the BLAS, few enough for the cache."""

STRIP_FLOATS = 1 << 17
"""About so much of a picture is gone over at once where there are no tiles."""

EPSILON = 1e-6
"""Added to the variance in every norm."""


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A picture of C channels. `data` (rows, columns, C) may be larger than it; what is outside is arbitrary."""

    data: Floats
    height: int
    width: int

    @classmethod
    def empty(cls, height: int, width: int, channels: int) -> "FeatureMap":
        """One with room for every tile, its values arbitrary."""
        rows, columns = (-(-side // ALIGNMENT) * ALIGNMENT for side in (height, width))
        return cls(np.empty((rows, columns, channels), np.float32), height, width)

    @classmethod
    def copy_of(cls, picture: Floats) -> "FeatureMap":
        """Shapes: picture (H, W, C)."""
        made = cls.empty(*picture.shape)
        made.inside[...] = picture
        return made

    @property
    def inside(self) -> Floats:
        """The picture itself, (H, W, C), a view."""
        return self.data[: self.height, : self.width]

    @property
    def channels(self) -> int:
        """C."""
        return int(self.data.shape[2])


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
class _Block:
    """Some tiles of one picture: rows and columns of the grid of tiles."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def norm(crew: Crew, x: FeatureMap, weight: Floats, bias: Floats, groups: int) -> Affine:
    """The statistics of `groups` of neighbouring channels, and what normalising by them comes to.

    Each strip is centred by itself before it is squared, and strips are joined in float64: no cancellation.
    """
    channels = x.channels
    strips = chunks(x.height, max(1, STRIP_FLOATS // (x.width * channels)))
    means, squares = (np.empty((len(strips), channels)) for _ in range(2))
    longest = max(strip.stop - strip.start for strip in strips) * x.width
    scratch = np.empty((crew.size, longest, channels), np.float32)
    ones = np.ones((1, longest), np.float32)

    def measure(worker: int, index: int) -> None:
        values = x.inside[strips[index]].reshape(-1, channels)
        count = len(values)
        centred, sums = scratch[worker, :count], np.empty((1, channels), np.float32)
        crew.gemm.multiply(ones[:, :count], values, sums)
        sums /= count
        np.subtract(values, sums, out=centred)
        means[index] = sums[0]
        np.square(centred, out=centred)
        crew.gemm.multiply(ones[:, :count], centred, sums)
        squares[index] = sums[0]

    crew.share(measure, range(len(strips)))
    counts = np.array([[(strip.stop - strip.start) * x.width] for strip in strips], np.float64)
    # Of each channel over the strips, then of each group over its channels.
    total = counts.sum()
    mean = (counts * means).sum(axis=0) / total
    square = (squares + counts * (means - mean) ** 2).sum(axis=0)
    mean, square = mean.reshape(groups, -1), square.reshape(groups, -1)
    group_mean = mean.mean(axis=1, keepdims=True)
    variance = (square / total + (mean - group_mean) ** 2).mean(axis=1, keepdims=True)
    scale = (np.broadcast_to(1.0 / np.sqrt(variance + EPSILON), mean.shape).reshape(-1)) * weight
    shift = bias - np.repeat(group_mean[:, 0], channels // groups) * scale
    return Affine(scale.astype(np.float32), shift.astype(np.float32))


class Convolver:
    """Runs 3 x 3 convolutions of one kind. Owns nothing but scratch memory while it runs."""

    def __init__(self, crew: Crew, transform: Transform) -> None:
        self._crew = crew
        self._transform = transform

    def __call__(
        self, x: FeatureMap, kernel: Kernel, affine: Affine | None = None, onto: FeatureMap | None = None
    ) -> FeatureMap:
        """Convolve SiLU(x * scale + shift), or x itself where there is no `affine`; add it `onto` that map if given.

        Shapes: x (H, W, I); returns (H', W', O).
        """
        transform, channels = self._transform, kernel.matrices.shape[2]
        # A window's new inputs become a tile's outputs.
        height, width = (side * transform.tile // transform.step for side in (x.height, x.width))
        out = FeatureMap.empty(height, width, channels) if onto is None else onto
        blocks = _blocks(-(-height // transform.tile), -(-width // transform.tile))
        planes = self._kernel_planes(kernel.matrices)
        workspaces = [_Workspace(transform, blocks, x.channels, channels) for _ in range(self._crew.size)]
        half = None if affine is None else Affine(affine.scale * np.float32(0.5), affine.shift * np.float32(0.5))

        def convolve(worker: int, block: _Block) -> None:
            space = workspaces[worker].of(block)
            space.read(x, half)
            self._crew.gemm.multiply(transform.inputs, space.tiles, space.planes)
            tiles, outputs = space.stacks
            self._crew.gemm.multiply_stacks(tiles, planes, outputs)
            self._crew.gemm.multiply(transform.outputs, space.products, space.results)
            space.write(out, kernel.bias, accumulate=onto is not None)

        self._crew.share(convolve, blocks)
        return out

    def _kernel_planes(self, matrices: Floats) -> Floats:
        """Shapes: (9, I, O) to (P, I, O)."""
        taps, inputs, outputs = matrices.shape
        made = np.empty((self._transform.planes, inputs, outputs), np.float32)
        flat, result = matrices.reshape(taps, -1), made.reshape(len(made), -1)

        def transform(_: int, part: slice) -> None:
            self._crew.gemm.multiply(self._transform.kernels, flat[:, part], result[:, part])

        self._crew.share(transform, chunks(inputs * outputs, 1 << 14))
        return made


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

    def read(self, x: FeatureMap, half: Affine | None) -> None:
        """Cut the block's tiles out of the picture, behind norm and SiLU if there are any; zeros around the picture.

        `half` is half of scale and shift: silu(2h) = h + h * tanh(h).
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
        if half is None:
            target[...] = source
        else:
            np.multiply(source, half.scale, out=target)
            target += half.shift
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
        if accumulate:
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


def _blocks(down: int, across: int) -> list[_Block]:
    """A grid of tiles in blocks, as square as may be: a block reads a margin around it once more."""
    side = max(1, int(TILES**0.5))
    columns = chunks(across, max(side, TILES // max(1, down)))
    rows = chunks(down, max(1, TILES // max(part.stop - part.start for part in columns)))
    return [_Block(row, column) for row in rows for column in columns]


def project(crew: Crew, x: FeatureMap, kernel: Kernel) -> FeatureMap:
    """A 1 x 1 convolution. Shapes: x (H, W, I); returns (H, W, O)."""
    (matrix,) = kernel.matrices
    out = FeatureMap.empty(x.height, x.width, matrix.shape[1])

    def multiply(_: int, rows: slice) -> None:
        result = out.data[rows].reshape(-1, out.channels)
        crew.gemm.multiply(x.data[rows].reshape(-1, x.channels), matrix, result)
        result += kernel.bias

    crew.share(multiply, chunks(len(x.data), max(1, STRIP_FLOATS // (x.data.shape[1] * x.channels))))
    return out
