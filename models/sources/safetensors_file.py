"""A safetensors file whose header has been verified against the file's length, and its tensors as NumPy arrays.

Source: safetensors 0.5, README, "Format".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from models.errors import CheckpointError
from models.quantization import Array

# The float8 kinds are read as bytes; a caller who cannot use them refuses them by name.
DTYPES: Mapping[str, npt.DTypeLike] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
}
DTYPE_BITS: Mapping[str, int] = {name: 8 * np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
FLOATING = frozenset({"F16", "BF16", "F32"})
_UNREADABLE: Mapping[str, int] = {"F64": 64, "C64": 64, "F8_E5M2": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of the header; `begin` is the first byte of its data in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int

    def entry(self, index: int) -> "StoredTensor":
        """One entry of its first axis."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], nbytes=nbytes, begin=self.begin + index * nbytes)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The verified header of one file; `label` is what messages call the file."""

    path: Path
    label: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    size: int

    def array(self, stored: StoredTensor) -> Array:
        """Read one of the file's tensors. Thread: any.

        Shape: that of `stored`; bfloat16 is `ml_dtypes.bfloat16`, 8-bit floats come as uint8.

        Raises:
            CheckpointError: the tensor is of a type that is not read here, or the file is no longer what it was.
        """
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise self._wrong(stored, f"its type {stored.dtype} is not supported")
        try:
            changed = self.path.stat().st_size != self.size
            values = np.fromfile(self.path, dtype, math.prod(stored.shape), offset=stored.begin)
        except OSError as error:
            raise self._wrong(stored, f"cannot be read: {error.strerror}") from error
        if changed or values.nbytes != stored.nbytes:
            raise self._wrong(stored, "cannot be read: the file has changed since it was opened")
        return values.reshape(stored.shape)

    def mapped(self, stored: StoredTensor) -> Array:
        """A view of one of the file's tensors, of which nothing is read yet. Thread: any. As `array` otherwise."""
        dtype = DTYPES.get(stored.dtype)
        if dtype is None or not stored.nbytes:
            return self.array(stored)
        try:
            if self.path.stat().st_size != self.size:
                raise self._wrong(stored, "cannot be read: the file has changed since it was opened")
            return np.memmap(self.path, dtype, "r", stored.begin, stored.shape).view(np.ndarray)
        except OSError as error:
            raise self._wrong(stored, f"cannot be read: {error.strerror}") from error

    def _wrong(self, stored: StoredTensor, reason: str) -> CheckpointError:
        return CheckpointError(reason, file=self.label, tensor=stored.key)


def open_safetensors(path: Path, label: str) -> SafetensorsFile:
    """Read and verify a file's header.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, or its header makes no sense.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"not a safetensors file, or truncated: its header claims {length} of {size} bytes", file=label
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=label) from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not a safetensors file: its header is not JSON", file=label) from error
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file: its header is not an object", file=label)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError("its metadata is not an object", file=label)
    tensors = _verified(header, 8 + length, size, label)
    return SafetensorsFile(path, label, {str(key): str(value) for key, value in metadata.items()}, tensors, size)


def _verified(header: Mapping[str, object], data_begin: int, size: int, label: str) -> dict[str, StoredTensor]:
    data_size = size - data_begin
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        dtype, shape, begin, end = _fields(entry, key, label)
        bits = DTYPE_BITS.get(dtype) or _UNREADABLE.get(dtype)
        if bits is None:
            raise CheckpointError(f"its type {dtype!r} is unknown", file=label, tensor=key)
        nbytes = (math.prod(shape) * bits + 7) // 8
        if end - begin != nbytes:
            raise CheckpointError(
                f"{end - begin} bytes are stored, but {dtype} {list(shape)} takes {nbytes}", file=label, tensor=key
            )
        if end > data_size:
            raise CheckpointError(
                f"the file is truncated: {data_size} bytes of data, and this tensor ends at byte {end}",
                file=label,
                tensor=key,
            )
        tensors[key] = StoredTensor(key, dtype, shape, nbytes, data_begin + begin)
        spans.append((begin, end, key))
    spans.sort()
    for (_, previous_end, previous), (begin, end, key) in pairwise(spans):
        if begin < previous_end and end > begin:
            raise CheckpointError(f"its data overlaps that of {previous}", file=label, tensor=key)
    return tensors


def _fields(entry: object, key: str, label: str) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(dim) is int and 0 <= dim < 2**31 for dim in shape) and 0 <= begin <= end
        ):
            return dtype, tuple(shape), begin, end
    raise CheckpointError("its header entry is malformed", file=label, tensor=key)
