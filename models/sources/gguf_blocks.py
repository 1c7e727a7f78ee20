"""The data of GGUF tensors: rows of blocks, read, and repacked exactly into MLX's affine layout where that can be.

Q4_0, Q4_1 and Q8_0 are affine in groups of 32, as MLX's are: only the order of the bits and the sign differ.

Source: ggml-common.h (block_q4_0, block_q4_1, block_q8_0) for the blocks; mlx.core.quantize for the packed layout.
"""

import math
from collections.abc import Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from models.errors import CheckpointError
from models.quantization import Array, Blocks, Packed, QuantizationSpec
from models.sources.gguf_header import GGUFTensor

REPACKED: Mapping[Kind, QuantizationSpec] = {
    Kind.Q4_0: QuantizationSpec("affine", 4, 32),
    Kind.Q4_1: QuantizationSpec("affine", 4, 32),
    Kind.Q8_0: QuantizationSpec("affine", 8, 32),
}
_Parts: TypeAlias = tuple[Array, Array, Array]
PLAIN: Mapping[Kind, npt.DTypeLike] = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.BF16: ml_dtypes.bfloat16}
_OTHER_BLOCKS = frozenset({Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K})


def check_kind(tensor: GGUFTensor) -> None:
    """Refuse a block format that is not read here.

    Raises:
        CheckpointError: it is not.
    """
    if tensor.kind not in REPACKED and tensor.kind not in _OTHER_BLOCKS and tensor.kind not in PLAIN:
        known = ", ".join(kind.name for kind in sorted({*PLAIN, *REPACKED, *_OTHER_BLOCKS}))
        raise CheckpointError(
            f"its type {tensor.kind.name} is not supported (known: {known}); choose a version of the model in one of "
            "these",
            file=str(tensor.path),
            tensor=tensor.name,
        )


def read_rows(tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, row by row (a tensor of one dimension is one row). Thread: any.

    Shapes: returns uint8 (rows, bytes of a row).

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


def block_size(kind: str) -> int | None:
    """Values of a block of the format of that name; None: it is none of GGML's. Thread: any."""
    return int(GGML_QUANT_SIZES[Kind[kind]][0]) if kind in Kind.__members__ else None


def map_rows(tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
    """The same as a view of the file, of which nothing is read yet. Thread: any. Raises CheckpointError."""
    shape = math.prod(tensor.shape[:-1]), tensor.nbytes // math.prod(tensor.shape[:-1])
    try:
        return np.memmap(tensor.path, np.uint8, "r", tensor.offset, shape).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=str(tensor.path), tensor=tensor.name) from error


def as_packed(value: Blocks) -> Packed | None:
    """The same matrix in MLX's layout; None if that has no room for it. Thread: any.

    It has not for other formats than those of REPACKED, nor for a zero point beyond float16 (no real model has that).

    Shapes: the weight is uint32 (..., in * bits / 32), scales and biases are float16 (..., in / 32).
    """
    match value.kind:
        case Kind.Q4_0:
            weight, scales, biases = _repacked_q4_0(value.rows)
        case Kind.Q4_1:
            weight, scales, biases = _repacked_q4_1(value.rows)
        case Kind.Q8_0:
            weight, scales, biases = _repacked_q8_0(value.rows)
        case _:
            return None
    if not (np.isfinite(biases).all() and np.isfinite(scales).all()):
        return None
    weight, scales, biases = (part.reshape(*value.shape[:-1], -1) for part in (weight, scales, biases))
    return Packed(weight, scales, biases, REPACKED[value.kind])


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


def _repacked_q4_0(rows: npt.NDArray[np.uint8]) -> _Parts:
    blocks = _blocks(rows, 18)
    scales = _halves(blocks, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = scales * np.float16(-8)
    return _words(_nibbles(blocks[..., 2:])), scales, biases


def _repacked_q4_1(rows: npt.NDArray[np.uint8]) -> _Parts:
    blocks = _blocks(rows, 20)
    return _words(_nibbles(blocks[..., 4:])), _halves(blocks, 0), _halves(blocks, 2)


def _repacked_q8_0(rows: npt.NDArray[np.uint8]) -> _Parts:
    blocks = _blocks(rows, 34)
    scales = _halves(blocks, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = scales * np.float16(-128)
    # A signed byte with its top bit flipped is the byte plus 128.
    return _words(blocks[..., 2:] ^ np.uint8(0x80)), scales, biases
