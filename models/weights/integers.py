"""The exact integer form of quantised matrices, and the quantisation of dense ones into it.

Whatever the format, a group's codes are put around the middle of the range, so that a product's partial sums are as
small as the values, and an activation's rounding weighs no more than it must.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from models.packing import Bytes, Floats, e2m1_doubled, e4m3, e8m0, packed, unpacked
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

    Shapes: codes uint8 (N, K * bits / 8), packed (`models.packing`); scales and offsets float32 (N, K / group). `bits`
    is 2, 4 or 8; `zero` is always half of their range. `offsets` is None where there are none but 0.
    """

    codes: Bytes
    bits: int
    scales: Floats
    offsets: Floats | None
    group: int

    @property
    def zero(self) -> int:
        """The code that stands for 0, or for the offset."""
        return 1 << (self.bits - 1)


def can_join(exponents: Bytes) -> bool:
    """Whether neighbouring blocks of mxfp4 with these exponents are exactly one block of 64 in 8 bits. Thread: any.

    Shapes: exponents uint8 (N, K / 32).
    """
    pairs = exponents.shape[-1] // 2
    if exponents.ndim != 2 or exponents.shape[-1] % 2 or not exponents.size:
        return False
    paired = exponents.reshape(-1, pairs, 2)
    low, high = np.minimum(paired[..., 0], paired[..., 1]), np.maximum(paired[..., 0], paired[..., 1])
    return bool((high - low).max() <= _MOST_SHIFT and high.max() != _NO_NUMBER)


def integers(value: Packed | Blocks, bits: int = 2, block: int = 0) -> Integers | None:
    """The integer form of a quantised matrix; None if it has none (mxfp8), or is no matrix. Thread: any.

    Of 2, 4 and 8 bits the least that hold the format's codes, and at least `bits`. Blocks of mxfp4 that `can_join` are
    joined to groups of `block` values.

    Formats without offsets come out to the bit. An offset is rounded to float32 once, so that a value with one is as
    near as half a unit in the last place of that offset.
    """
    if len(value.shape) != 2:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(value, Blocks):
            return _of_blocks(value, bits)
        match value.spec.mode:
            case "affine":
                return _of_affine(value, bits)
            case "mxfp4":
                return _of_mxfp4(value, max(block, value.spec.group_size))
            case "nvfp4":
                return _of_e2m1(value, e4m3(value.scales))
        return None


def quantized(shape: tuple[int, ...], dense_of: Callable[[slice], Floats], bits: int, group: int = 32) -> Integers:
    """A matrix rounded to the nearest of 4- or 8-bit codes, symmetrically. Thread: any.

    In 4 bits the value of the greatest magnitude in a group becomes code 0, in 8 bits code 1 or 255.

    Source: llama.cpp b4500 ggml/src/ggml-quants.c, quantize_row_q4_0_ref and quantize_row_q8_0_ref.

    Shapes: `shape` is (N, K), where `group` divides K; `dense_of` gives some of the rows, float32 (rows, K).
    """
    assert bits in (4, 8)
    n, k = shape
    zero = 1 << (bits - 1)
    codes, scales = np.empty((n, k * bits // 8), np.uint8), np.empty((n, k // group), np.float32)
    for rows in _chunks(n, k):
        grouped = dense_of(rows).reshape(-1, k // group, group)
        low, high = grouped.min(axis=-1), grouped.max(axis=-1)
        scale = np.where(-low > high, low, high) / -zero if bits == 4 else np.maximum(-low, high) / (zero - 1)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        values = grouped * inverse[..., None]
        np.rint(values, out=values)
        values += zero
        np.clip(values, 0, 2 * zero - 1, out=values)
        codes[rows] = packed(values.astype(np.uint8).reshape(-1, k), bits)
        scales[rows] = scale
    return Integers(codes, bits, scales, None, group)


def _chunks(n: int, k: int) -> Iterator[slice]:
    """Rows that are worked on at once: so few that what is computed on the way stays small."""
    step = max(_CHUNK_VALUES // k, 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _of_blocks(value: Blocks, bits: int) -> Integers | None:
    layout = LAYOUTS.get(value.kind)
    if layout is None:
        return None
    n, k = value.shape
    scales, least = layout.scales(value.rows.reshape(-1, layout.nbytes))

    def codes_of(rows: slice) -> Bytes:
        return layout.codes(value.rows[rows].reshape(-1, layout.nbytes)).reshape(-1, k)

    held = _held(layout.bits, bits)
    codes = _centred((n, k), codes_of, layout.bits, held)
    scales = scales.reshape(n, -1)
    offsets = None if least is None else _offsets(scales, least.reshape(n, -1), layout.bits)
    return Integers(codes, held, scales, offsets, layout.group)


def _of_affine(value: Packed, bits: int) -> Integers:
    assert value.biases is not None
    spec = value.spec
    held = _held(spec.bits, bits)
    if held == spec.bits:
        codes = np.ascontiguousarray(value.weight).view(np.uint8)
    else:
        codes = _centred(value.shape, lambda rows: unpacked(value.weight[rows], spec.bits), spec.bits, held)
    scales = value.scales.astype(np.float32)
    return Integers(codes, held, scales, _offsets(scales, value.biases.astype(np.float32), spec.bits), spec.group_size)


def _held(own: int, least: int) -> int:
    return next(each for each in (2, 4, 8) if each >= max(own, least))


def _centred(shape: tuple[int, ...], codes_of: Callable[[slice], Bytes], bits: int, held: int) -> Bytes:
    """Codes of so many bits in the middle of the range of those that hold them, packed."""
    n, k = shape
    codes = np.empty((n, k * held // 8), np.uint8)
    moved = np.uint8((1 << (held - 1)) - (1 << (bits - 1)))
    for rows in _chunks(n, k):
        codes[rows] = packed(codes_of(rows) + moved if moved else codes_of(rows), held)
    return codes


def _offsets(scales: Floats, least: Floats, bits: int) -> Floats | None:
    """What a code in the middle stands for, `least` being what a code of 0 does; None if it is 0 throughout."""
    middle = 1 << (bits - 1)
    offsets = (least.astype(np.float64) + middle * scales.astype(np.float64)).astype(np.float32)
    return offsets if offsets.any() else None


def _of_mxfp4(value: Packed, group: int) -> Integers:
    """The least exponent of the blocks of a group is the group's; the others' codes are shifted by what is missing."""
    together = value.scales.reshape(len(value.scales), -1, group // value.spec.group_size)
    least = reduce(np.minimum, np.moveaxis(together, -1, 0))
    shifts = (together - least[..., None]).reshape(value.scales.shape)
    return replace(_of_e2m1(value, e8m0(least), shifts), group=group)


def _of_e2m1(value: Packed, scales: Floats, shifts: Bytes | None = None) -> Integers:
    """4-bit floats: their doubles are whole numbers, which eight bits hold, shifted by up to three bits a block too."""
    if value.global_scale is not None:
        scales = scales * value.global_scale.astype(np.float32).reshape(())
    shifted = e2m1_doubled().astype(np.int16) << np.arange(_MOST_SHIFT + 1)[:, None]
    table = (shifted + 128).astype(np.uint8).reshape(-1)
    codes = np.empty(value.shape, np.uint8)
    for rows in _chunks(*value.shape):
        places = unpacked(value.weight[rows], value.spec.bits)
        if shifts is not None:
            places.reshape(*shifts[rows].shape, -1)[...] |= shifts[rows, :, None] << np.uint8(value.spec.bits)
        codes[rows] = table.take(places)
    return Integers(codes, 8, scales * np.float32(0.5), None, value.spec.group_size)
