"""GGML's block formats in NumPy: the code of each value, and the scale and least value of each group of them.

A value is `scale * code + least`; in a format without least values the codes' middle stands for 0.

Shapes: blocks are uint8 (n, bytes of a block).
Source: llama.cpp b4500 ggml/src/ggml-common.h for the blocks, ggml/src/ggml-quants.c (dequantize_row_*) for what they
mean, both as gguf-py 0.17 gguf/quants.py has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from gguf import GGMLQuantizationType as Kind

from models.packing import Bytes, Floats

Scales: TypeAlias = tuple[Floats, Floats | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """A block format.

    `codes` gives uint8 (n, values of a block), each below 2 ** bits; `scales` gives scales and least values, float32
    (n, groups of a block), or None where the middle of the codes is 0.
    """

    nbytes: int
    bits: int
    group: int
    codes: Callable[[Bytes], Bytes]
    scales: Callable[[Bytes], Scales]


def _planes(packed: Bytes, bits: int, run: int) -> Bytes:
    """Codes that lie in planes: a run of bytes has a run of codes in its lowest bits, the next run above, and so on.

    Shapes: packed (n, bytes); returns (n, bytes * 8 / bits).
    """
    runs = np.ascontiguousarray(packed).reshape(len(packed), -1, run)
    planes = 8 // bits
    codes = np.empty((*runs.shape[:2], planes, run), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for plane in range(planes):
        codes[:, :, plane] = runs >> np.uint8(bits * plane) & mask
    return codes.reshape(len(packed), -1)


def _with_high(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """Put `high` above the lowest `bits` of `low`, in place of both."""
    high <<= np.uint8(bits)
    low |= high
    return low


def _half(blocks: Bytes, start: int) -> Floats:
    """Shapes: returns (n, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _halves(*starts: int) -> Callable[[Bytes], Scales]:
    """The scale at the first place, the least value at the second."""

    def read(blocks: Bytes) -> Scales:
        scale, *least = (_half(blocks, start) for start in starts)
        return scale, least[0] if least else None

    return read


def _four_bits(start: int) -> Callable[[Bytes], Bytes]:
    return lambda blocks: _planes(blocks[:, start:], 4, 16)


def _five_bits(start: int) -> Callable[[Bytes], Bytes]:
    def read(blocks: Bytes) -> Bytes:
        high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
        return _with_high(_planes(blocks[:, start + 4 :], 4, 16), high, 4)

    return read


def _q8_0_codes(blocks: Bytes) -> Bytes:
    # A signed byte with its top bit flipped is the byte plus 128.
    return blocks[:, 2:] ^ np.uint8(0x80)


def _q2_k_codes(blocks: Bytes) -> Bytes:
    return _planes(blocks[:, 16:80], 2, 32)


def _q2_k_scales(blocks: Bytes) -> Scales:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & np.uint8(15)).astype(np.float32)
    return scales, -_half(blocks, 82) * (packed >> np.uint8(4)).astype(np.float32)


def _q3_k_codes(blocks: Bytes) -> Bytes:
    return _with_high(_planes(blocks[:, 32:96], 2, 32), _planes(blocks[:, :32], 1, 32), 2)


def _q3_k_scales(blocks: Bytes) -> Scales:
    packed = _with_high(_planes(blocks[:, 96:104], 4, 8), _planes(blocks[:, 104:108], 2, 4), 4)
    return _half(blocks, 108) * (packed.astype(np.float32) - 32), None


def _q4_k_codes(blocks: Bytes) -> Bytes:
    return _planes(blocks[:, 16:], 4, 32)


def _q5_k_codes(blocks: Bytes) -> Bytes:
    return _with_high(_planes(blocks[:, 48:], 4, 32), _planes(blocks[:, 16:48], 1, 32), 4)


def _six_bit_scales(blocks: Bytes) -> Scales:
    """Of Q4_K and Q5_K: eight scales and least values of six bits, the last four's upper bits above the first four."""
    first, second, rest = (blocks[:, start : start + 4] for start in (4, 8, 12))
    low, upper = np.uint8(0x3F), np.uint8(0x30)
    scales = np.concatenate((first & low, rest & np.uint8(15) | first >> np.uint8(2) & upper), axis=1)
    least = np.concatenate((second & low, rest >> np.uint8(4) | second >> np.uint8(2) & upper), axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), -_half(blocks, 2) * least.astype(np.float32)


def _q6_k_codes(blocks: Bytes) -> Bytes:
    return _with_high(_planes(blocks[:, :128], 4, 64), _planes(blocks[:, 128:192], 2, 32), 4)


def _q6_k_scales(blocks: Bytes) -> Scales:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


LAYOUTS: Mapping[Kind, Layout] = {
    Kind.Q4_0: Layout(18, 4, 32, _four_bits(2), _halves(0)),
    Kind.Q4_1: Layout(20, 4, 32, _four_bits(4), _halves(0, 2)),
    Kind.Q5_0: Layout(22, 5, 32, _five_bits(2), _halves(0)),
    Kind.Q5_1: Layout(24, 5, 32, _five_bits(4), _halves(0, 2)),
    Kind.Q8_0: Layout(34, 8, 32, _q8_0_codes, _halves(0)),
    Kind.Q2_K: Layout(84, 2, 16, _q2_k_codes, _q2_k_scales),
    Kind.Q3_K: Layout(110, 3, 16, _q3_k_codes, _q3_k_scales),
    Kind.Q4_K: Layout(144, 4, 32, _q4_k_codes, _six_bit_scales),
    Kind.Q5_K: Layout(176, 5, 32, _q5_k_codes, _six_bit_scales),
    Kind.Q6_K: Layout(210, 6, 16, _q6_k_codes, _q6_k_scales),
}
