"""The data of GGUF tensors: rows of blocks, repacked exactly into MLX's affine layout or dequantised.

Q4_0, Q4_1 and Q8_0 are affine in groups of 32, as MLX's are: only the order of the bits and the sign differ.

Shapes: `rows` is uint8 (rows, bytes of a row); a repacked matrix has weight uint32 (rows, in * bits / 32), scales and
biases float16 (rows, in / 32).
Source: ggml-common.h (block_q4_0, block_q4_1, block_q8_0) for the blocks; mlx.core.quantize for the packed layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize

from models.errors import CheckpointError
from models.quantization import QuantizationSpec
from models.sources.gguf_header import GGUFTensor

REPACKED: Mapping[Kind, QuantizationSpec] = {
    Kind.Q4_0: QuantizationSpec("affine", 4, 32),
    Kind.Q4_1: QuantizationSpec("affine", 4, 32),
    Kind.Q8_0: QuantizationSpec("affine", 8, 32),
}
DEQUANTIZED = frozenset({Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K})
PLAIN: Mapping[Kind, str] = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.BF16: "<u2"}


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A matrix in MLX's affine layout, in NumPy."""

    weight: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.float16]
    biases: npt.NDArray[np.float16]


def check_kind(tensor: GGUFTensor) -> None:
    """Refuse a block format that is not read here.

    Raises:
        CheckpointError: it is not.
    """
    if tensor.kind not in REPACKED and tensor.kind not in DEQUANTIZED and tensor.kind not in PLAIN:
        known = ", ".join(kind.name for kind in sorted({*PLAIN, *REPACKED, *DEQUANTIZED}))
        raise CheckpointError(
            f"its type {tensor.kind.name} is not supported (known: {known}); choose a version of the model in one of "
            "these",
            file=str(tensor.path),
            tensor=tensor.name,
        )


def read_rows(tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, row by row (a tensor of one dimension is one row).

    Raises:
        CheckpointError: the file has become shorter, or cannot be read.
    """
    try:
        data = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(tensor.path), tensor=tensor.name) from error
    if data.size != tensor.nbytes:
        raise CheckpointError("the file has been cut short", file=str(tensor.path), tensor=tensor.name)
    return data.reshape(math.prod(tensor.shape[:-1]), -1)


def repack(rows: npt.NDArray[np.uint8], kind: Kind) -> PackedRows | None:
    """The same matrix in MLX's layout, or None if a zero point does not fit float16 (no real model has that)."""
    match kind:
        case Kind.Q4_0:
            packed = _repack_q4_0(rows)
        case Kind.Q4_1:
            packed = _repack_q4_1(rows)
        case Kind.Q8_0:
            packed = _repack_q8_0(rows)
        case _:
            raise AssertionError(kind)
    exact = np.isfinite(packed.biases).all() and np.isfinite(packed.scales).all()
    return packed if exact else None


def floats(rows: npt.NDArray[np.uint8], kind: Kind) -> npt.NDArray[np.float32]:
    """The values of quantised rows as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: npt.NDArray[np.float32] = dequantize(rows, kind)
    return values


def _blocks(rows: npt.NDArray[np.uint8], nbytes: int) -> npt.NDArray[np.uint8]:
    return rows.reshape(rows.shape[0], -1, nbytes)


def _halves(blocks: npt.NDArray[np.uint8], start: int) -> npt.NDArray[np.float16]:
    values: npt.NDArray[np.float16] = np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]
    return values


def _words(quants: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(quants).reshape(quants.shape[0], -1).view("<u4")


def _nibbles(quants: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """GGML pairs weight i with weight i + 16 in a byte, MLX weight 2i with weight 2i + 1."""
    low, high = quants & 15, quants >> 4
    return np.concatenate((low[..., 0::2] | low[..., 1::2] << 4, high[..., 0::2] | high[..., 1::2] << 4), axis=-1)


def _repack_q4_0(rows: npt.NDArray[np.uint8]) -> PackedRows:
    blocks = _blocks(rows, 18)
    scales = _halves(blocks, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = scales * np.float16(-8)
    return PackedRows(_words(_nibbles(blocks[..., 2:])), scales, biases)


def _repack_q4_1(rows: npt.NDArray[np.uint8]) -> PackedRows:
    blocks = _blocks(rows, 20)
    return PackedRows(_words(_nibbles(blocks[..., 4:])), _halves(blocks, 0), _halves(blocks, 2))


def _repack_q8_0(rows: npt.NDArray[np.uint8]) -> PackedRows:
    blocks = _blocks(rows, 34)
    scales = _halves(blocks, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = scales * np.float16(-128)
    # A signed byte with its top bit flipped is the byte plus 128.
    return PackedRows(_words(blocks[..., 2:] ^ np.uint8(0x80)), scales, biases)
