"""The layers of diffusion transformers on numpy arrays: what is fast on a CPU.

MLX's CPU backend runs every element-wise operation in one thread and `exp` at 14 ns an element; numpy's kernels take
0.5 ns, and a `Crew` shares them among all cores. Products go by column blocks of the weight, so that each is packed
once; attention goes by heads and some hundred queries, so that few scores are held. All float32; the rows of an array
may lie apart, the elements of a row lie together. Results are written where the caller says: nothing is held twice.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.image.gemm import SHARES, Crew, chunks

Floats: TypeAlias = npt.NDArray[np.float32]
Rotations: TypeAlias = npt.NDArray[np.complex64]

ROWS = 64
"""So many rows are normalised, turned or activated at a time."""

QUERIES = 384
"""So many queries of one head look at the keys at a time: with fewer, products over long sequences take up to twice as
long, and more gain nothing."""

SAFE_SCORE = 64.0
"""Below it neither exp(score) nor the sum of a million of them leaves the numbers that float32 keeps exactly."""


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer that is to be computed: out = x @ weight.T, or, if `more`, out = x @ weight.T + x' @ weight'.T."""

    x: Floats
    """(N, I)"""
    weight: Floats
    """(O, I)"""
    out: Floats
    """(N, O)"""
    more: tuple[Floats, Floats] | None = None
    """x' (N, I'), weight' (O, I')."""


def workspace(*shapes: tuple[int, ...]) -> list[Floats]:
    """Arrays of these shapes, zero, in memory that goes back to the system when the last of them is gone.

    What malloc gets back it keeps, and from step to step finds fewer holes that are large enough: five steps were
    measured to hold 1.7 times what one needs. Pages that are new each time cost a thousandth of a step.
    """
    sizes = [math.prod(shape) for shape in shapes]
    numbers = np.frombuffer(mmap.mmap(-1, max(4 * sum(sizes), 1)), np.float32)
    return [part.reshape(shape) for part, shape in zip(np.split(numbers, np.cumsum(sizes)[:-1]), shapes, strict=True)]


def multiply(crew: Crew, products: Sequence[Product]) -> None:
    """Compute them all."""

    def work(_: int, task: tuple[Product, slice]) -> None:
        product, columns = task
        out = product.out[:, columns]
        crew.gemm.multiply(product.x, product.weight[columns], out, transpose_b=True)
        if product.more is not None:
            x, weight = product.more
            crew.gemm.multiply(x, weight[columns], out, accumulate=True, transpose_b=True)

    parts = 2 * SHARES
    crew.share(
        work,
        [
            (product, columns)
            for product in products
            for columns in chunks(product.out.shape[1], max(1, -(-product.out.shape[1] // parts)))
        ],
    )


def layer_norm(x: Floats, scale: Floats, shift: Floats, eps: float, out: Floats) -> None:
    """Normalise rows, then scale and shift. Shapes: x and out (N, D), scale and shift (D,)."""
    np.subtract(x, x.mean(axis=1, keepdims=True), out=out)
    variance = np.einsum("ij,ij->i", out, out) / np.float32(x.shape[1])
    out *= (1.0 / np.sqrt(variance + np.float32(eps)))[:, None]
    out *= scale
    out += shift


def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """Normalise rows to a mean square of 1, then scale. Shapes: x and out (N, D), may be the same; weight (D,)."""
    mean_square = np.vecdot(x, x) / np.float32(x.shape[1])
    np.multiply(x, (1.0 / np.sqrt(mean_square + np.float32(eps)))[:, None], out=out)
    out *= weight


def head_norm(x: Floats, weight: Floats, eps: float) -> None:
    """RMS norm of each head, in place. Shapes: x (N, H, d), weight (d,)."""
    mean_square = np.einsum("ijk,ijk->ij", x, x) / np.float32(x.shape[2])
    x *= (1.0 / np.sqrt(mean_square + np.float32(eps)))[:, :, None]
    x *= weight


def turn(x: Floats, rotations: Rotations) -> None:
    """Rotate interleaved pairs, in place. Shapes: x (N, H * d), rotations (N, 1, d / 2)."""
    pairs = x.view(np.complex64).reshape(len(x), -1, rotations.shape[2])
    pairs *= rotations


def swiglu(gate: Floats, up: Floats) -> None:
    """Gate = silu(gate) * up, in place. Shapes: alike."""
    # silu(g) = h + h * tanh(h) with h = g / 2.
    gate *= np.float32(0.5)
    scale = np.tanh(gate)
    scale += np.float32(1.0)
    gate *= scale
    gate *= up


def attend(crew: Crew, queries: Floats, keys: Floats, values: Floats, heads: int, *, bound: float) -> None:
    """Everyone looks at everyone; the queries are overwritten with what they find.

    Args:
        crew: who computes.
        queries: (N, H * d), in them the scale of the scores.
        keys: (M, H * d).
        values: (M, H * d).
        heads: H.
        bound: no score is larger; below SAFE_SCORE the softmax need not look for the largest.
    """
    dim = queries.shape[1] // heads
    rows = chunks(len(queries), QUERIES)
    (buffers,) = workspace((crew.size, max(part.stop - part.start for part in rows) * len(keys)))

    def work(worker: int, task: tuple[int, slice]) -> None:
        head, part = task
        columns = slice(head * dim, (head + 1) * dim)
        mine = queries[part, columns]
        scores = buffers[worker, : len(mine) * len(keys)].reshape(len(mine), len(keys))
        crew.gemm.multiply(mine, keys[:, columns], scores, transpose_b=True)
        if bound > SAFE_SCORE:
            scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        crew.gemm.multiply(scores, values[:, columns], mine)
        mine *= (1.0 / scores.sum(axis=1))[:, None]

    crew.share(work, [(head, part) for head in range(heads) for part in rows])


def score_bound(query_norm: Floats, key_norm: Floats) -> float:
    """What no score exceeds, of queries and keys that were normalised with these weights. Shapes: (d,) each.

    A normalised head has the length sqrt(d) before its weight, and turning it keeps its length.
    """
    return math.sqrt(len(query_norm)) * math.sqrt(len(key_norm)) * float(abs(query_norm).max() * abs(key_norm).max())


def attention_bytes(crew_size: int, queries: int, keys: int) -> int:
    """The scores that `attend` holds."""
    return 4 * crew_size * min(queries, QUERIES) * keys
