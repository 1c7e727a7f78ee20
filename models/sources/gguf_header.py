"""The header of a GGUF file: metadata and tensor entries, every length and offset verified against the file.

Source: the GGUF specification (ggml docs/gguf.md), versions 2 and 3, little-endian.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from models.errors import CheckpointError
from models.gguf_metadata import GGUFValue

GGUF_MAGIC = b"GGUF"
_SCALARS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor's entry, and the file it is in.

    Shape has the rows first (GGUF writes the contiguous dimension first); offset is from the start of the file.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    def entry(self, index: int) -> "GGUFTensor":
        """One entry of its first axis."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything before the data."""

    metadata: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF file does.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(4) == GGUF_MAGIC
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(path)) from error


def read_header(path: Path) -> GGUFHeader:
    """Read and verify the header.

    Raises:
        CheckpointError: the file is missing, truncated, of another version or byte order, or has an unknown type.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(file, size, path).header()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(path)) from error


class _Reader:
    """Reads values in sequence, never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file = file
        self._size = size
        self._path = path
        self._label = str(path)

    def header(self) -> GGUFHeader:
        if self._take(4) != GGUF_MAGIC:
            raise CheckpointError("not a GGUF file", file=self._label)
        version = self._integer("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"GGUF version {version} is not supported (2 and 3 are); a huge number is a big-endian file",
                file=self._label,
            )
        tensor_count, pair_count = self._integer("<Q"), self._integer("<Q")
        metadata: dict[str, GGUFValue] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._integer("<I"), depth=0)
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"its alignment {alignment!r} is not a power of two", file=self._label)
        start = -(-self._file.tell() // alignment) * alignment
        return GGUFHeader(metadata, self._placed(entries, start))

    def _placed(self, entries: list[GGUFTensor], start: int) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                raise CheckpointError("is there twice", file=self._label, tensor=entry.name)
            end = start + entry.offset + entry.nbytes
            if end > self._size:
                raise CheckpointError(
                    f"the file is truncated: it has {self._size} bytes, and this tensor ends at byte {end}",
                    file=self._label,
                    tensor=entry.name,
                )
            tensors[entry.name] = replace(entry, offset=start + entry.offset)
        return tensors

    def _entry(self) -> GGUFTensor:
        name = self._string()
        rank = self._integer("<I")
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise CheckpointError(f"it has {rank} dimensions", file=self._label, tensor=name)
        shape = tuple(self._integer("<Q") for _ in range(rank))[::-1]
        if 0 in shape:
            raise CheckpointError(f"its shape {list(shape)} is empty", file=self._label, tensor=name)
        number, offset = self._integer("<I"), self._integer("<Q")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"its type {number} is unknown", file=self._label, tensor=name) from error
        row = shape[-1]
        if row % block:
            raise CheckpointError(
                f"rows of {row} are no multiple of {kind.name}'s block", file=self._label, tensor=name
            )
        return GGUFTensor(name, kind, shape, offset, math.prod(shape) // block * block_bytes, self._path)

    def _value(self, kind: int, depth: int) -> GGUFValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth)
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise CheckpointError(f"its metadata has a value of unknown type {kind}", file=self._label)
        scalar = np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0]
        # The shortest decimal that is this float32: 1e-05 and not 9.999999747378752e-06.
        value: bool | int | float = float(str(scalar)) if dtype == "<f4" else scalar.item()
        return value

    def _array(self, depth: int) -> list[GGUFValue]:
        kind, count = self._integer("<I"), self._integer("<Q")
        dtype = _SCALARS.get(kind)
        if dtype is not None:
            values: list[GGUFValue] = np.frombuffer(self._take(count * np.dtype(dtype).itemsize), dtype).tolist()
            return values
        if depth >= _DEEPEST_ARRAY or count > self._size:
            raise CheckpointError("its metadata has an impossible array", file=self._label)
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        # Token strings may be any bytes; they keep them.
        return self._take(self._integer("<Q")).decode("utf-8", "surrogateescape")

    def _integer(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        assert isinstance(value, int)
        return value

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise CheckpointError("the file is truncated within its header, or damaged", file=self._label)
        return self._file.read(count)
