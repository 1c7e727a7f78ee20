"""MLX's packed layouts in NumPy: codes out of words, and the values that codes and scales of 4 and 8 bits stand for.

Codes of any number of bits are one stream of bits within a row, the earlier code in the lower bits of the earlier byte.

Source: mlx v0.32 mlx/backend/cpu/quantized.cpp for the packing; the OCP Microscaling specification 1.0 for the floats
e2m1, e4m3 and e8m0.
"""

import math
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
_DIVISORS = (2, 4, 8)
_PAIR = np.dtype("<u2")
"""Two codes in the order in which they lie."""


def unpacked(words: npt.NDArray[Any], bits: int) -> Bytes:
    """The codes of rows of words. `bits` is 2, 3, 4, 5, 6 or 8. Thread: any.

    Shapes: words (..., n * bits / 32) uint32; returns (..., n) uint8.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits in _DIVISORS:
        return _halved(stream, bits)
    # The fewest codes that fill whole bytes.
    period = 8 // math.gcd(bits, 8)
    groups = stream.reshape(*stream.shape[:-1], -1, period * bits // 8)
    codes = np.empty((*groups.shape[:-1], period), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        code = groups[..., byte] >> np.uint8(shift)
        if shift + bits > 8:
            code |= groups[..., byte + 1] << np.uint8(8 - shift)
        codes[..., index] = code & mask
    return codes.reshape(*stream.shape[:-1], -1)


def packed(codes: Bytes, bits: int) -> Bytes:
    """The inverse of `unpacked`, for 2, 4 or 8 bits. Thread: any.

    Shapes: codes (..., n) uint8; returns (..., n * bits / 8).
    """
    while bits < 8:
        pairs = codes.view(_PAIR)
        codes = (pairs | pairs >> _PAIR.type(8 - bits)).astype(np.uint8)
        bits *= 2
    return codes


def _halved(codes: Bytes, bits: int) -> Bytes:
    """Codes of 8 bits, cut into halves and these again until they are of so many."""
    width = 8
    while width > bits:
        width //= 2
        low = codes.astype(_PAIR)
        high = low >> _PAIR.type(width)
        high *= _PAIR.type(256)
        low &= _PAIR.type((1 << width) - 1)
        codes = (high | low).view(np.uint8)
    return codes


def e2m1_doubled() -> npt.NDArray[np.int8]:
    """Twice the value of each 4-bit float: whole numbers from -12 to 12. Shape: (16,). Thread: any.

    Half the codes are negative; minus zero is among them, and is no whole number, so it comes as 0.
    """
    positive = np.array(_E2M1_DOUBLED, np.int8)
    return np.concatenate((positive, -positive))


def e2m1(codes: Bytes) -> Floats:
    """The values of 4-bit floats, minus zero included. Shapes: any; returns the same. Thread: any."""
    positive = np.array(_E2M1_DOUBLED, np.float32) * np.float32(0.5)
    values: Floats = np.concatenate((positive, -positive))[codes]
    return values


def e4m3(codes: Bytes) -> Floats:
    """The values of 8-bit floats without infinities. Shapes: any; returns the same. Thread: any."""
    values: Floats = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def e8m0(codes: Bytes) -> Floats:
    """The powers of two that 8-bit exponents stand for. 255 is an infinity, as it is to MLX (OCP has a NaN there).

    Shapes: any; returns the same. Thread: any.
    """
    with np.errstate(over="ignore"):
        powers = np.ldexp(np.float32(1), np.arange(256) - 127)
    values: Floats = powers[codes]
    return values
