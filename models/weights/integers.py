"""The exact integer form of quantised matrices, and the quantisation of dense ones into it.

Whatever the format, a group's codes are put around the middle of the range, so that a product's partial sums are as
small as the values, and an activation's rounding weighs no more than it must.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from models.packing import Bytes, Floats, e2m1_doubled, e4m3, e8m0, unpacked
from models.quantization import Blocks, Packed
from models.weights.ggml import LAYOUTS

JOINED = 64
"""The blocks that neighbouring blocks of mxfp4 are joined to."""
_MOST_SHIFT = 3
"""Doubled, a 4-bit float is 12 at most, and 8 times as much is still a code of 8 bits."""
_NO_NUMBER = 255
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix (N, K) of which each value is `scales * (codes - zero) + offsets`.

    Shapes: codes uint8 (N, K), each below 2 ** bits; scales and offsets float32 (N, K / group). `bits` is 2, 4 or 8,
    the least of them that holds the format's codes; `zero` is always half of their range. `offsets` is None where
    there are none but 0.
    """

    codes: Bytes
    bits: int
    zero: int
    scales: Floats
    offsets: Floats | None
    group: int


def can_join(exponents: Bytes) -> bool:
    """Whether neighbouring blocks of mxfp4 with these exponents are exactly one block of 64 in 8 bits. Thread: any.

    Shapes: exponents uint8 (N, K / 32).
    """
    pairs = exponents.shape[-1] // 2
    if exponents.ndim != 2 or exponents.shape[-1] % 2 or not exponents.size:
        return False
    paired = exponents.reshape(-1, pairs, 2)
    low, high = paired.min(axis=-1), paired.max(axis=-1)
    return bool((high - low).max() <= _MOST_SHIFT and high.max() != _NO_NUMBER)


def integers(value: Packed | Blocks, block: int = 0) -> Integers | None:
    """The integer form of a quantised matrix; None if it has none (mxfp8), or is no matrix. Thread: any.

    Blocks of mxfp4 that `can_join` are joined to groups of `block` values.

    Formats without offsets come out to the bit. An offset is rounded to float32 once, so that a value with one is as
    near as half a unit in the last place of that offset.
    """
    if len(value.shape) != 2:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(value, Blocks):
            return _of_blocks(value)
        match value.spec.mode:
            case "affine":
                return _of_affine(value)
            case "mxfp4":
                return _of_mxfp4(value, max(block, value.spec.group_size))
            case "nvfp4":
                return _of_e2m1(value, e4m3(value.scales))
        return None


def quantized(dense: Floats, bits: int, group: int = 32) -> Integers:
    """A dense matrix rounded to the nearest of 4- or 8-bit codes, symmetrically. Thread: any.

    In 4 bits the value of the greatest magnitude in a group becomes code 0, in 8 bits code 1 or 255.

    Source: llama.cpp b4500 ggml/src/ggml-quants.c, quantize_row_q4_0_ref and quantize_row_q8_0_ref.

    Shapes: dense float32 (N, K), where `group` divides K.
    """
    assert bits in (4, 8)
    n, k = dense.shape
    zero = 1 << (bits - 1)
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, k // group), np.float32)
    for rows in _chunks(n, k):
        grouped = dense[rows].reshape(-1, k // group, group)
        low, high = grouped.min(axis=-1), grouped.max(axis=-1)
        scale = np.where(-low > high, low, high) / -zero if bits == 4 else np.maximum(-low, high) / (zero - 1)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        values = grouped * inverse[..., None]
        np.rint(values, out=values)
        values += zero
        np.clip(values, 0, 2 * zero - 1, out=values)
        codes[rows] = values.reshape(-1, k)
        scales[rows] = scale
    return Integers(codes, bits, zero, scales, None, group)


def _chunks(n: int, k: int) -> Iterator[slice]:
    """Rows that are worked on at once: so few that what is computed on the way stays small."""
    step = max(_CHUNK_VALUES // k, 1)
    return (slice(start, start + step) for start in range(0, n, step))


def _of_blocks(value: Blocks) -> Integers | None:
    layout = LAYOUTS.get(value.kind)
    if layout is None:
        return None
    n, k = value.shape
    scales, least = layout.scales(value.rows.reshape(-1, layout.nbytes))

    def codes_of(rows: slice) -> Bytes:
        return layout.codes(value.rows[rows].reshape(-1, layout.nbytes)).reshape(-1, k)

    return _centred(
        (n, k),
        codes_of,
        scales.reshape(n, -1),
        least.reshape(n, -1) if least is not None else None,
        bits=layout.bits,
        group=layout.group,
    )


def _of_affine(value: Packed) -> Integers:
    assert value.biases is not None
    spec = value.spec
    return _centred(
        value.shape,
        lambda rows: unpacked(value.weight[rows], spec.bits),
        value.scales.astype(np.float32),
        value.biases.astype(np.float32),
        bits=spec.bits,
        group=spec.group_size,
    )


def _centred(
    shape: tuple[int, ...],
    codes_of: Callable[[slice], Bytes],
    scales: Floats,
    least: Floats | None,
    *,
    bits: int,
    group: int,
) -> Integers:
    """Move codes of any bits to the middle of a range, and the offsets with them.

    `least` is what a code of 0 stands for; None if a code in the middle stands for 0.
    """
    held = next(each for each in (2, 4, 8) if each >= bits)
    zero, middle = 1 << (held - 1), 1 << (bits - 1)
    offsets = None
    if least is not None:
        offsets = (least.astype(np.float64) + middle * scales.astype(np.float64)).astype(np.float32)
    codes = np.empty(shape, np.uint8)
    for rows in _chunks(*shape):
        codes[rows] = codes_of(rows)
        if zero != middle:
            codes[rows] += np.uint8(zero - middle)
    return Integers(codes, held, zero, scales, offsets if offsets is not None and offsets.any() else None, group)


def _of_mxfp4(value: Packed, group: int) -> Integers:
    """The least exponent of the blocks of a group is the group's; the others' codes are shifted by what is missing."""
    together = value.scales.reshape(len(value.scales), -1, group // value.spec.group_size)
    least = together.min(axis=-1)
    shifts = (together - least[..., None]).reshape(value.scales.shape)
    return replace(_of_e2m1(value, e8m0(least), shifts), group=group)


def _of_e2m1(value: Packed, scales: Floats, shifts: Bytes | None = None) -> Integers:
    """4-bit floats: their doubles are whole numbers, which eight bits hold, shifted by up to three bits a block too."""
    if value.global_scale is not None:
        scales = scales * value.global_scale.astype(np.float32).reshape(())
    zero = 128
    table = ((e2m1_doubled().astype(np.int16) << np.arange(_MOST_SHIFT + 1)[:, None]) + zero).astype(np.uint8)
    codes = np.empty(value.shape, np.uint8)
    for rows in _chunks(*value.shape):
        places = unpacked(value.weight[rows], value.spec.bits)
        if shifts is not None:
            places.reshape(*shifts[rows].shape, -1)[...] |= shifts[rows, :, None] << np.uint8(value.spec.bits)
        codes[rows] = table.reshape(-1)[places]
    return Integers(codes, 8, zero, scales * np.float32(0.5), None, value.spec.group_size)
